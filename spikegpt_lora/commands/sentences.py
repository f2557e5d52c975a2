"""Sentences that a command reads: arguments, a file, or what is piped into it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..tasks.splits import lines_in
from ..tasks.text import to_ascii
from ..utils import command_line


def add_sentences(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Options for what `sentences_of` reads; `otherwise`: where sentences come from if none is given."""
    add = parser.add_argument
    add("sentences", nargs="*", metavar="SENTENCE", help=f"what is read ({otherwise})")
    add("--file", type=Path, help="read this file instead, a sentence a line; blank lines are left out")
    add("--batch-size", type=command_line.positive, default=32, help="sentences at a time")
    add("--max-length", type=command_line.positive, default=128, help="tokens a sentence")


def sentences_of(args: argparse.Namespace) -> list[str]:
    """Those of the command line or of --file; none where neither is given.

    Raises:
        ValueError: both are given, no such file, no UTF-8, or nothing but blank lines.
    """
    if args.sentences and args.file:
        raise ValueError("sentences come from the command line or from --file: leave out one of them")
    if args.file:
        return read_sentences(args.file)
    return _without_blank(args.sentences, "the command line") if args.sentences else []


def piped() -> list[str]:
    """The lines of stdin that are not blank.

    Raises:
        ValueError: nobody pipes anything, no UTF-8, or no sentence.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("there is nothing to read: give sentences, --file FILE, or a pipe")
    return _without_blank([text for _, text in lines_in(sys.stdin.buffer.read(), "stdin", "UTF-8")], "stdin")


def read_sentences(file: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: no such file, no UTF-8, or no sentence.
    """
    if not file.is_file():
        raise ValueError(f"sentences are read from a text file, a sentence a line, and there is no file {file}")
    return _without_blank([text for _, text in lines_in(file.read_bytes(), str(file), "UTF-8")], str(file))


def encoded(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], max_length: int) -> BatchEncoding:
    """A padded batch of `sentences` in lower-case ASCII, as tasks have them: input_ids and attention_mask `(B, T)`.

    Raises:
        ValueError: a sentence without a token.
    """
    texts = [to_ascii(sentence) for sentence in sentences]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    for sentence, real in zip(sentences, batch["attention_mask"].any(dim=1).tolist()):
        if not real:
            raise ValueError(f"a sentence must have a word in ASCII letters, got {sentence!r}")
    return batch


def _without_blank(texts: list[str], place: str) -> list[str]:
    if not (kept := [text.strip() for text in texts if text.strip()]):
        raise ValueError(f"{place} must hold a sentence, found blank ones alone")
    return kept
