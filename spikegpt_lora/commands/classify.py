"""Classify sentences with what was fine-tuned: label, probability and sentence, a tab-separated line each.

    spikegpt_lora classify runs/subj/spikelora/seed0 "a small gem ." "he goes home ."
    spikegpt_lora classify runs/subj/full/seed0 --file sentences.txt --json
    spikegpt_lora classify runs/subj/full/seed0 < sentences.txt

MODEL is the folder of a classifier or of its adapter, as subj_finetune.py leaves them. A sentence is read as the tasks'
own are, in lower-case ASCII, and cut to --max-length tokens.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoint import load_classifier
from ..forward import run
from ..utils import command_line
from .sentences import add_sentences, encoded, piped, sentences_of


@dataclass(frozen=True)
class Answer:
    """The likeliest label of a sentence, and its probability."""

    label: str
    probability: float
    sentence: str


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_arguments(arguments, prog)
    sentences = sentences_of(args) or piped()
    command_line.set_up()
    model, tokenizer = load_classifier(args.model)
    for answer in classify(model, tokenizer, sentences, args.max_length, args.batch_size):
        line = f"{answer.label}\t{answer.probability:.4f}\t{' '.join(answer.sentence.split())}"
        print(json.dumps(asdict(answer), ensure_ascii=False) if args.json else line)
    return 0


def parse_arguments(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, prog)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a fine-tuned classifier or of its adapter")
    add_sentences(parser, "or else stdin, a sentence a line")
    add("--json", action="store_true", help='a line of JSON each: {"label": ..., "probability": ..., "sentence": ...}')
    return parser.parse_intermixed_args(arguments)  # options may stand before sentences


def classify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    max_length: int = 128,
    batch_size: int = 32,
) -> Iterator[Answer]:
    """What a classifier (from `load_classifier`) says of each sentence, in their order.

    Raises:
        ValueError: a sentence without a token.
    """
    for start in range(0, len(sentences), batch_size):
        some = sentences[start : start + batch_size]
        likeliest = run(model, encoded(tokenizer, some, max_length)).logits.softmax(dim=-1).max(dim=-1)
        for sentence, probability, label in zip(some, likeliest.values.tolist(), likeliest.indices.tolist()):
            yield Answer(model.config.id2label[label], probability, sentence)
