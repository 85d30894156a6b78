"""A first cost table from the first steps of a server that nobody profiled.

    seconds = fixed + per token * tokens + drafting (where drafts were asked for)

fitted to the first decode steps by least squares of relative errors; a prefill gives the time of a large forward.
Later steps correct the table (`paceline.plan.pace`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from paceline.arrays import BoolArray, FloatArray
from paceline.plan.cost_model import CostTable

WANTED = 20
"""Decode steps that a table is made from."""
_FAR = 2.0
"""Times of what the fit says from which on a step is an outlier."""
_LEAST_SLOPE = 1e-4
"""Of the time of one token, for each further one: no forward is free."""


class _Seen(NamedTuple):
    tokens: int
    asked: bool
    seconds: float


class FirstCosts:
    """Gathers steps until there are enough."""

    def __init__(self) -> None:
        self._decodes: list[_Seen] = []
        self._prefill: tuple[int, float] | None = None

    def add(self, tokens: int, prompt_tokens: int, *, asked: bool, seconds: float) -> None:
        """Take in a step: tokens of its forward, and how many of them were a prompt's."""
        if tokens < 1:
            return
        if not prompt_tokens:
            self._decodes.append(_Seen(tokens, asked, seconds))
        elif self._prefill is None or seconds / tokens < self._prefill[1] / self._prefill[0]:
            self._prefill = tokens, seconds

    @property
    def ready(self) -> bool:
        """Whether a table can be made."""
        return len(self._decodes) >= WANTED

    def table(self) -> CostTable:
        """The table of what was seen."""
        seen = self._decodes[2:]  # the first steps pay for what is set up once
        tokens = np.array([s.tokens for s in seen], dtype=np.float64)
        seconds = np.array([s.seconds for s in seen])
        rows = np.column_stack([np.ones(len(seen)), tokens, [float(s.asked) for s in seen]])
        good = seconds <= _FAR * np.median(seconds)
        for _ in range(2):
            values = _positive_fit(rows[good], seconds[good])
            good = seconds <= _FAR * (rows @ values)
        fixed, per_token, _ = values.tolist()
        one = max(fixed + per_token, 1e-6)
        most = int(max(tokens.max(), 2))
        sizes, times = [1, most], [one, max(fixed + per_token * most, one * (1.0 + _LEAST_SLOPE * (most - 1)))]
        if self._prefill is not None and self._prefill[0] > most:
            sizes.append(self._prefill[0])
            times.append(max(self._prefill[1], times[-1] * (1.0 + _LEAST_SLOPE)))
        return CostTable(tuple(sizes), tuple(times), about={"measured": "the first steps of a vLLM server"})


def _positive_fit(rows: FloatArray, seconds: FloatArray) -> FloatArray:
    """Least squares of relative errors without negative values.  # [n, 3], [n] -> [3]"""
    used: BoolArray = np.ones(rows.shape[1], dtype=np.bool_)
    values = np.zeros(rows.shape[1])
    while used.any():
        found = np.linalg.lstsq(rows[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
        values[:] = 0.0
        values[used] = found
        if found.min() >= 0.0:
            break
        used &= values > 0.0
    return values
