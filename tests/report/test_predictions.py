"""predictions.tsv: a line a sentence, whatever stands in it."""

import pytest

from spikegpt_lora.report.predictions import write_predictions


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
