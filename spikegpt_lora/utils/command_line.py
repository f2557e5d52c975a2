"""Shared parts of the command lines of package and recipes."""

import argparse
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import transformers

from . import errors, precision
from .malloc import keep_freed_memory
from .stopping import obey
from .threads import keep_to_own_processors

RANGES = {
    "> 0 and finite": lambda x: 0 < x < math.inf,
    ">= 0 and finite": lambda x: 0 <= x < math.inf,
    ">= 0": lambda x: x >= 0,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Text as it is written, and the default after each option that has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "(default" in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def parser(text: str, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser described by a program's docstring: the first paragraph before the options, the rest after them.

    Args:
        prog: what the program is called; None: as its file is.
    """
    description, _, details = text.partition("\n\n")
    return argparse.ArgumentParser(prog, description=description, epilog=details, formatter_class=HelpFormatter)


class _Asked(argparse.Action):
    """Keeps the precision that is asked for; an error where two options ask for different ones."""

    def __call__(self, parser, namespace, values, option_string=None):
        asked, before = values or self.const, getattr(namespace, self.dest)
        if before not in ("auto", asked):
            parser.error(f"--precision and --bf16 must ask for the same, got {before} and {asked}: give one of the two")
        setattr(namespace, self.dest, asked)


def add_precision(add: Callable) -> None:
    """Give a parser, whose `add_argument` this is, --precision, and --bf16 for --precision bfloat16."""
    text = "auto: bfloat16 where the processor has fast products of it; a run that goes on keeps its own"
    add("--precision", action=_Asked, choices=precision.CHOICES, default="auto", help=text)
    alias = {"dest": "precision", "nargs": 0, "const": "bfloat16", "default": argparse.SUPPRESS}
    add("--bf16", action=_Asked, help="the same as --precision bfloat16", **alias)


def positive(text: str) -> int:
    """An option's whole number from 1 on.

    Raises:
        ValueError: no whole number. argparse.ArgumentTypeError: one below 1.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def part(text: str) -> tuple[int, int]:
    """An option that says I/N, the I-th of N parts.

    Raises:
        argparse.ArgumentTypeError: it does not.
    """
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text!r}")
    return int(number), int(parts)


def add_sharing(add: Callable) -> None:
    """Give a parser, whose `add_argument` this is, what shares a comparison's runs out to processes and machines."""
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time, each in a process of its own")
    add("--shard", type=part, metavar="I/N", help="run the I-th of N parts of the runs, for --merge; 1/N ... N/N")
    text = "take finished runs from these folders first"
    add("--merge", nargs="+", type=Path, default=[], metavar="FOLDER", help=text)


def number(rule: str) -> Callable[[str], float]:
    """The type of an option that takes a number as `rule` says: one of the keys of `RANGES`."""
    holds = RANGES[rule]

    def parse(text: str) -> float:
        value = float(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    parse.__name__ = "float"  # what argparse calls it in its message
    return parse


def seed(text: str) -> int:
    """A seed as NumPy takes it."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2**32 - 1, got {value}")
    return value


def utf8(text: str) -> str:
    """An option's text; bytes that are no UTF-8 reach Python as characters that no encoder takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise argparse.ArgumentTypeError(f"must be UTF-8 text, found byte 0x{byte:02x} at {error.start + 1}") from error
    return text


def set_up() -> None:
    """For a program that trains or writes: messages plain, transformers quiet, memory kept, threads not too many."""
    # peft asks models for a name that transformers has renamed; who reads it can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("spikegpt_lora").setLevel(logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()
    keep_to_own_processors()


def run(main: Callable[[], int], stopped: str = "stopped") -> int:
    """The exit status of `main()`, whatever happens in it.

    2 with one sentence on stderr for what a user can mend, 1 for a defect of ours (`errors.TRACEBACK` shows its place),
    130 after Ctrl-C and 143 after SIGTERM.

    Args:
        stopped: what is said after Ctrl-C and SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, obey)
    try:
        return main()
    except KeyboardInterrupt as stop:
        print(f"\n{stopped}", file=sys.stderr)
        return 143 if isinstance(stop, errors.Stopped) else 130
    except Exception as error:
        if os.environ.get(errors.TRACEBACK):
            raise
        known = errors.sentence(error)
        print(f"error: {known or errors.unforeseen(error)}", file=sys.stderr)
        return 2 if known else 1
    finally:
        signal.signal(signal.SIGTERM, before)
