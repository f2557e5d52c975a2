"""What the recipes' command lines have in common."""

import argparse

import pytest

from spikegpt_lora.utils import command_line, errors

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


@pytest.mark.parametrize(
    "kind, right, wrong, message",
    [
        (command_line.number("in (0, 1]"), "1", ["0", "nan", "1.1"], r"must be in \(0, 1\], got"),
        (command_line.number(">= 0 and finite"), "0", ["-1", "inf", "nan"], "must be >= 0 and finite, got"),
        (command_line.seed, "0", ["-1", str(2**32)], r"must be between 0 and 2\*\*32 - 1, got"),
        (command_line.utf8, "é", ["a\udcff"], "must be UTF-8 text, found byte 0xff at 2"),
    ],
)
def test_an_options_value_out_of_range_is_refused(kind, right, wrong, message):
    kind(right)
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            kind(text)


@pytest.mark.parametrize(
    "arguments, asked",
    [
        ([], "auto"),
        (["--bf16"], "bfloat16"),
        (["--precision", "bfloat16"], "bfloat16"),
        (["--bf16", "--precision", "bfloat16"], "bfloat16"),
        (["--precision", "float32"], "float32"),
    ],
)
def test_bf16_is_another_name_of_precision_bfloat16(parser, arguments, asked):
    command_line.add_precision(parser.add_argument)
    assert parser.parse_args(arguments).precision == asked
    assert not hasattr(parser.parse_args(arguments), "bf16")


@pytest.mark.parametrize("arguments", [["--bf16", "--precision", "float32"], ["--precision", "float32", "--bf16"]])
def test_asking_for_two_precisions_is_refused(parser, capsys, arguments):
    command_line.add_precision(parser.add_argument)
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert "--precision and --bf16 must ask for the same, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("rank must be >= 1"), 2, "error: rank must be >= 1\n"),
        (FloatingPointError("it diverged"), 2, "error: it diverged\n"),
        (KeyError("method"), 1, "error: KeyError: 'method'\nThis was not foreseen"),
        (KeyboardInterrupt(), 130, "\nstopped by hand\n"),
        (errors.Stopped(), 143, "\nstopped by hand\n"),
    ],
)
def test_whatever_happens_is_a_sentence_and_a_status(error, status, message, capsys, monkeypatch):
    monkeypatch.delenv(errors.TRACEBACK, raising=False)

    def main():
        raise error

    assert command_line.run(main, "stopped by hand") == status
    assert message in capsys.readouterr().err


def test_the_place_of_a_defect_is_shown_on_request(monkeypatch):
    monkeypatch.setenv(errors.TRACEBACK, "1")
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 / 0)
