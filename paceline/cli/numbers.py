"""Types of numeric options: what is no such number is refused in words."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


def count(text: str) -> int:
    """A whole number of at least 1."""
    return int(_number(text, int, "a whole number of at least 1", 1))


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return int(_number(text, int, "a whole number of at least 0", 0))


def amount(text: str) -> int:
    """A whole number of at least 1, also in thousands or millions: 20k, 5M."""
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    what = "a number of at least 1, such as 500, 20k or 5M"
    return int(_number(text[:-1] if factor > 1 else text, float, what, 1.0 / factor) * factor)


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, float, "a number above 0", 0, above=True)


def not_negative(text: str) -> float:
    """A number of at least 0."""
    return _number(text, float, "a number of at least 0", 0)


def list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Several of them with commas between, each once."""

    def convert(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))

    return convert


def _number(text: str, kind: Callable[[str], float], what: str, least: float, *, above: bool = False) -> float:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
    if not math.isfinite(value) or value < least or (above and value == least):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
