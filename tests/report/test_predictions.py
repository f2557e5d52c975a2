"""predictions.tsv: a line a sentence, whatever stands in it."""

import pytest

from spikegpt_lora.report.predictions import Prediction, confusion, read_predictions, worst, write_predictions
from spikegpt_lora.utils.errors import DamagedFile


def test_a_line_a_sentence_with_the_likeliest_class_and_its_probability(tmp_path):
    file = tmp_path / "predictions.tsv"
    write_predictions(file, ["a film .", "a\tplot\n."], [0, 1], [[0.9, 0.1], [0.65, 0.35]], ["subjective", "objective"])
    assert file.read_text(encoding="utf-8").splitlines() == [
        "sentence\tlabel\tprediction\tprobability",
        "a film .\tsubjective\tsubjective\t0.9000",
        "a plot .\tobjective\tsubjective\t0.6500",
    ]


def test_as_many_of_each_are_needed(tmp_path):
    with pytest.raises(ValueError):
        write_predictions(tmp_path / "predictions.tsv", ["one"], [0, 1], [[1.0, 0.0]], ["a", "b"])
    assert not (tmp_path / "predictions.tsv").exists()


def test_what_was_written_is_read_again(tmp_path):
    sentences, shares = ["a film\u2028", "a \r plot", "<b>"], [[0.9, 0.1], [0.65, 0.35], [0.25, 0.75]]
    write_predictions(tmp_path / "predictions.tsv", sentences, [0, 1, 1], shares, ["yes", "no"])
    assert read_predictions(tmp_path / "predictions.tsv") == [
        Prediction("a film\u2028", "yes", "yes", 0.9),
        Prediction("a \r plot", "no", "yes", 0.65),
        Prediction("<b>", "no", "no", 0.75),
    ]


@pytest.mark.parametrize(
    "damaged", ["", "sentence\tlabel\n", "{head}a\tb\tc\n", "{head}a\tb\tc\tmuch\n", "{head}\udcff"]
)
def test_another_file_is_refused_by_name(tmp_path, damaged):
    text = damaged.format(head="sentence\tlabel\tprediction\tprobability\n")
    (tmp_path / "predictions.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedFile, match="predictions.tsv holds no predictions"):
        read_predictions(tmp_path / "predictions.tsv")


def test_confusion_counts_each_class_by_what_it_is_taken_for():
    seen = [Prediction("a", "x", "x", 0.9), Prediction("b", "x", "y", 0.6), Prediction("c", "x", "y", 0.7)]
    assert confusion(seen) == {("x", "x"): 1, ("x", "y"): 2}


def test_the_worst_sentences_are_those_with_the_highest_mean_probability_of_the_wrong_class():
    mine = [
        [Prediction("often", "x", "y", 0.9), Prediction("mean", "x", "y", 0.6), Prediction("right", "x", "x", 0.9)],
        [Prediction("often", "x", "x", 0.6), Prediction("mean", "x", "y", 0.8), Prediction("right", "x", "y", 0.8)],
    ]
    other = [[Prediction("mean", "x", "y", 1.0), Prediction("often", "x", "x", 1.0)]]
    first, second = worst({"mine": mine, "other": other}, "mine")
    assert first[:3] == ("mean", "x", "y") and first.probability == pytest.approx(0.7)
    assert (first.wrong, first.wrong_elsewhere) == ((2, 2), (1, 1))
    assert second.sentence == "often" and second.probability == pytest.approx(0.65)  # "right": 0.45
    assert (second.wrong, second.wrong_elsewhere) == ((1, 2), (0, 1))
    assert worst({"mine": mine}, "mine", most=1) == [first._replace(wrong_elsewhere=(0, 0))]


def test_a_sentence_that_stands_twice_in_a_file_counts_once():
    twice = [Prediction("a", "x", "y", 0.9)] * 2
    assert worst({"mine": [twice]}, "mine")[0].wrong == (1, 1)


def test_of_many_classes_an_unsure_right_answer_is_no_mistake():
    right = Prediction("so so .", "fear", "fear", 0.3)
    assert right.of_wrong == 0.3 and worst({"full": [[right]]}, "full") == []
