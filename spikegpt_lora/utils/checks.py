"""Checks of a configuration's values: types and rules, every violation in one message."""

import sys
import types
from dataclasses import is_dataclass
from typing import Literal, Union, get_args, get_origin

_WORDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text", type(None): "None"}
_SEQUENCES = (list, tuple, set, frozenset)


def violations(config, rules: list[tuple[str, str, bool]]) -> list[str]:
    """A sentence for each rule (name of the value, what it must be, whether it is) that `config` breaks."""
    return [f"{name} must be {rule}, got {getattr(config, name)!r}" for name, rule, holds in rules if not holds]


def check(config, rules: list[tuple[str, str, bool]]) -> None:
    """Raise ValueError with all the rules that `config` breaks, if any."""
    if problems := violations(config, rules):
        raise ValueError(f"{type(config).__name__}: {'; '.join(problems)}")


def kinds(config, annotations: dict) -> list[tuple[str, str, bool]]:
    """The rules that each value of `config` is of the type it is annotated with."""
    return [(name, _words(kind), _fits(getattr(config, name), kind)) for name, kind in annotations.items()]


def _fits(value, kind) -> bool:
    """Whether `value` may stand where a file or a caller gives a `kind`: a number is finite and no bool, a list may be
    another sequence, a dataclass may be the dict it is made of."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in _SEQUENCES:
        return isinstance(value, _SEQUENCES) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if kind in (int, float):
        number = type(value) is int or (kind is float and isinstance(value, float))
        return number and abs(value) <= sys.float_info.max  # also of whole numbers that are too large for a float
    return isinstance(value, kind) or (is_dataclass(kind) and isinstance(value, dict))


def _words(kind) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", or ".join(map(_words, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in _SEQUENCES:
        return f"a list of {_words(inner[0])}"
    return _WORDS.get(kind) or (f"a dict of {_words(inner[1])}" if origin is dict else f"a {kind.__name__}")
