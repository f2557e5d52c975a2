"""What a model answered to each test sentence: predictions.tsv, and what several of them say together.

Columns sentence, label, prediction, probability: what the model gives to its prediction, the likeliest class.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.errors import DamagedFile
from ..utils.files import write_text

COLUMNS = ("sentence", "label", "prediction", "probability")


class Prediction(NamedTuple):
    """A line of the file."""

    sentence: str
    label: str
    prediction: str
    probability: float

    @property
    def wrong(self) -> bool:
        return self.prediction != self.label

    @property
    def of_wrong(self) -> float:
        """What the model gives to the wrong class; where it is right and there are more than two, at most so much."""
        return self.probability if self.wrong else min(self.probability, 1 - self.probability)


class Mistake(NamedTuple):
    """A sentence that a method gets wrong, and by how many (wrong, of all) of its runs, and of other methods' runs."""

    sentence: str
    label: str
    prediction: str
    probability: float  # of the wrong class, mean over the method's runs
    wrong: tuple[int, int]
    wrong_elsewhere: tuple[int, int]


def write_predictions(
    path: Path, sentences: Sequence[str], labels: Sequence[int], probabilities: Sequence, names: Sequence[str]
) -> None:
    """Write a line a sentence.

    Args:
        labels: index of each sentence's class in `names`.
        probabilities: `(sentences, classes)`.
    """
    lines = ["\t".join(COLUMNS)]
    for sentence, label, given in zip(sentences, labels, probabilities, strict=True):
        likeliest = int(np.argmax(given))
        said = sentence.replace("\t", " ").replace("\n", " ")
        lines.append("\t".join([said, names[label], names[likeliest], f"{given[likeliest]:.4f}"]))
    write_text(path, "\n".join(lines) + "\n")


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote.

    Raises:
        DamagedFile: another file, or a line of other columns.
    """
    try:
        head, *lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        rows = [line.split("\t") for line in lines]
        if tuple(head.split("\t")) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
            raise ValueError(f"each line must have {', '.join(COLUMNS)}, with tabs between")
        return [Prediction(*row[:3], float(row[3])) for row in rows]
    except ValueError as error:
        raise DamagedFile(f"{path} holds no predictions ({error}): delete it, the report goes without") from error


def confusion(predictions: Iterable[Prediction]) -> Counter[tuple[str, str]]:
    """How many sentences have which (label, prediction)."""
    return Counter((one.label, one.prediction) for one in predictions)


def worst(runs: dict[str, list[list[Prediction]]], method: str, most: int = 20) -> list[Mistake]:
    """The sentences that `method` is most confidently wrong about: those of the highest mean probability of the wrong
    class, above a half.

    Args:
        runs: of each method a list of predictions a run.
    """
    mine = _by_sentence(runs[method])
    elsewhere = _by_sentence(chain.from_iterable(of_other for name, of_other in runs.items() if name != method))
    mistakes = []
    for key, given in mine.items():
        probability = float(np.mean([one.of_wrong for one in given]))
        if probability > 0.5:
            said = Counter(one.prediction for one in given if one.wrong).most_common(1)[0][0]
            mistakes.append(Mistake(*key, said, probability, _wrong(given), _wrong(elsewhere.get(key, []))))
    return sorted(mistakes, key=lambda mistake: -mistake.probability)[:most]


def _by_sentence(runs: Iterable[list[Prediction]]) -> dict[tuple[str, str], list[Prediction]]:
    """(sentence, label) -> a prediction a run that tested it; one that stands twice in a run's file counts once."""
    found: dict[tuple[str, str], list[Prediction]] = {}
    for run in runs:
        for key, one in {(one.sentence, one.label): one for one in run}.items():
            found.setdefault(key, []).append(one)
    return found


def _wrong(given: list[Prediction]) -> tuple[int, int]:
    return sum(one.wrong for one in given), len(given)
