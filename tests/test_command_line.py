"""What the recipes' command lines have in common."""

import argparse

import pytest

from spikegpt_lora import command_line

TEXT = """What it does.

    how it is called

What it leaves.
"""


@pytest.fixture
def parser():
    parser = command_line.parser(TEXT)
    parser.add_argument("--rate", default=0.0, help="of steps")
    parser.add_argument("--names", default=["a", "b"], nargs="+", help="of these")
    parser.add_argument("--folder", help="to write to (default: runs)")
    parser.add_argument("--fast", action="store_true", help="less exact")
    return parser


def test_help_keeps_the_text_as_it_is_written(parser):
    shown = parser.format_help()
    parts = ["What it does.", "--rate RATE ", "\n    how it is called\n\nWhat it leaves."]
    assert sorted(parts, key=shown.rindex) == parts


def test_help_shows_each_default_once_and_only_where_there_is_one(parser):
    lines = " ".join(parser.format_help().split())
    assert "of steps (default: 0.0)" in lines and "of these (default: a b)" in lines
    assert lines.count("(default: runs)") == 1 and "less exact (default" not in lines


def test_positive_takes_whole_numbers_from_one():
    assert command_line.positive("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="must be >= 1, got 0"):
        command_line.positive("0")
