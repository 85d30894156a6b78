"""When requests arrive: users who wait for their answers, random arrivals at a rate, or those of a recorded trace.

A trace is CSV with the header `TIMESTAMP,ContextTokens,GeneratedTokens` (the form of the Azure LLM inference traces);
`TIMESTAMP` is a date with a time or a number of seconds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from paceline.errors import InputError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request: seconds after the first one, prompt tokens and output tokens."""

    seconds: float
    context: int
    generated: int


@dataclass(frozen=True, slots=True)
class Closed:
    """`users` people, each of whom asks again as soon as the last answer is complete."""

    users: int

    axis = "users"

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.users} user{'s' if self.users > 1 else ''}"

    @property
    def load(self) -> float:
        """Its place on the axis of loads."""
        return float(self.users)


@dataclass(frozen=True, slots=True)
class Poisson:
    """Requests that come at random, `rate` a second on average, whether or not earlier ones are answered."""

    rate: float

    axis = "requests per second"

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.rate:g} req/s"

    @property
    def load(self) -> float:
        """Its place on the axis of loads."""
        return self.rate

    def times(self, seed: Sequence[int], *, count: int | None = None, duration: float | None = None) -> list[float]:
        """Seconds from the start, ascending, the first one 0.

        Args:
            seed: what the gaps are drawn from.
            count: most arrivals.
            duration: seconds in which they fall; at least one of the two is needed.
        """
        random, now, times = np.random.default_rng(seed), 0.0, list[float]()
        while len(times) < (count or math.inf) and now < (duration or math.inf):
            times.append(now)
            now += random.exponential(1 / self.rate)
        return times


@dataclass(frozen=True, slots=True)
class Replay:
    """The arrivals of a trace, `factor` times as fast as they were recorded."""

    rows: tuple[TraceRow, ...]
    factor: float

    axis = "speed of the trace"

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"trace ×{self.factor:g}"

    @property
    def load(self) -> float:
        """Its place on the axis of loads."""
        return self.factor

    def times(self, _seed: Sequence[int], *, count: int | None = None, duration: float | None = None) -> list[float]:
        """Seconds from the start, ascending: those of the first `count` rows that fall into `duration` seconds."""
        times = [row.seconds / self.factor for row in self.rows[:count]]
        return [t for t in times if duration is None or t < duration]


Point = Closed | Poisson | Replay
"""One load level."""


def read_trace(path: str | Path, *, field: str = "--trace") -> list[TraceRow]:
    """The requests of a trace in order of arrival.

    Raises:
        InputError: the file cannot be read, has other columns, or has a bad row (the message names its line).
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return _rows(csv.reader(file), path, field)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read {path} ({reason}).", field=field) from error


def _rows(lines: Any, path: str | Path, field: str) -> list[TraceRow]:
    header = tuple(cell.strip() for cell in next(lines, []))
    if header != COLUMNS:
        raise InputError(f"{path} must begin with the line {','.join(COLUMNS)}.", field=field)
    rows: list[TraceRow] = []
    first = 0.0
    for cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"line {lines.line_num} of {path}"
        try:
            seconds, context, generated = _row(cells)
        except ValueError as error:
            raise InputError(f"{where} {error}.", field=field, fix="Correct or delete that line.") from error
        first = seconds if not rows else first
        rows.append(TraceRow(seconds - first, context, generated))
        if len(rows) > 1 and rows[-1].seconds < rows[-2].seconds:
            raise InputError(f"{where} is earlier than the line before it.", field=field, fix="Sort the file by time.")
    if not rows:
        raise InputError(f"{path} holds no request.", field=field)
    return rows


def _row(cells: Sequence[str]) -> tuple[float, int, int]:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"has {len(cells)} columns instead of {len(COLUMNS)}")
    counts = []
    for name, cell in zip(COLUMNS[1:], cells[1:], strict=True):
        if not cell.strip().isdecimal() or int(cell) < 1:
            raise ValueError(f"has {name} {cell.strip()!r}, which is not a whole number of at least 1")
        counts.append(int(cell))
    return _seconds(cells[0].strip()), counts[0], counts[1]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        pass
    else:
        if math.isfinite(value):
            return value
        raise ValueError(f"has TIMESTAMP {text!r}, which is not finite")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"has TIMESTAMP {text!r}, which is neither a date nor a number of seconds") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
