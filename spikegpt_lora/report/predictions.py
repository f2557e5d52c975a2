"""What a model answered to each test sentence: predictions.tsv.

Columns sentence, label, prediction, probability: what the model gives to its prediction, the likeliest class.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.files import write_text

COLUMNS = ("sentence", "label", "prediction", "probability")


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
