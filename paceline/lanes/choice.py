"""Whether a lane for the draft would pay on a machine: seconds per token of each schedule, from measured times.

With acceptance a, independent from token to token, l draft tokens a round, d seconds for a draft token and T(n) for a
target forward over n tokens, a schedule makes a *cycle* of rounds up to the next token that the target has to bring:

    none          T(1) for a token
    speculation   l d + T(l + 1) for (1 - a^(l+1)) / (1 - a) tokens
    PEARL         max(l d, T(1)), then with probability a rounds of max(l d, T(l)), each followed by another with
                  probability a^l; the cycle brings 1 / (1 - a) tokens
    pre only      max(l d, T(1)), then with probability a T(l); tokens as under speculation
    post only     l d + max(l d, T(l + 1)), then with probability a^(l+1) rounds of max(l d, T(l)), each followed by
                  another with probability a^l; 1 / (1 - a) tokens

What runs beside something else takes the times measured beside something else: two lanes on one machine share its
cores and its memory. `tests/unit/test_lane_choice.py` holds these formulas against the clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from paceline.errors import InputError

NONE, SPECULATION, PEARL = "none", "speculation", "pearl"


@dataclass(frozen=True, slots=True)
class LaneTimes:
    """Measured seconds.

    Raises:
        InputError: a time is no positive number, or there is none of a single token.
    """

    target: Mapping[int, float]
    """Of a target forward by its tokens; linear in between, and beyond as steeply as between the last two."""
    draft: float
    """Of one draft token."""

    def __post_init__(self) -> None:
        for value in (*self.target.values(), self.draft):
            if not (math.isfinite(value) and value > 0.0):
                raise InputError(f"holds {value}, which is no time.", field="lane times", fix="Give positive seconds.")
        if 1 not in self.target:
            raise InputError("lack a target forward of one token.", field="lane times")

    def forward(self, size: int) -> float:
        """Seconds of a target forward over `size` tokens."""
        sizes = sorted(self.target)
        seconds = [self.target[n] for n in sizes]
        if size > sizes[-1] and len(sizes) > 1:
            slope = max((seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]), 0.0)
            return seconds[-1] + slope * (size - sizes[-1])
        return float(np.interp(size, sizes, seconds))

    @property
    def ratio(self) -> float:
        """Draft tokens that take as long as a target forward."""
        return self.forward(1) / self.draft


def no_lookahead(times: LaneTimes) -> float:
    """Seconds per token without speculation."""
    return times.forward(1)


def speculation(times: LaneTimes, length: int, acceptance: float) -> float:
    """Seconds per token of drafting `length` tokens, then verifying them."""
    return (length * times.draft + times.forward(length + 1)) / _round_tokens(length, acceptance)


def pearl(times: LaneTimes, length: int, acceptance: float) -> float:
    """Seconds per token of PEARL; `times` beside one another."""
    rounds = acceptance / (1.0 - acceptance**length) * _beside(times, length, length)
    return (_beside(times, length, 1) + rounds) * (1.0 - acceptance)


def pre_only(beside: LaneTimes, alone: LaneTimes, length: int, acceptance: float) -> float:
    """Seconds per token of PEARL without post-verify."""
    cycle = _beside(beside, length, 1) + acceptance * alone.forward(length)
    return cycle / _round_tokens(length, acceptance)


def post_only(beside: LaneTimes, alone: LaneTimes, length: int, acceptance: float) -> float:
    """Seconds per token of PEARL without pre-verify, for lengths of at least 2 (at 1 nothing is ever pending)."""
    first = length * alone.draft + _beside(beside, length, length + 1)
    more = acceptance ** (length + 1) / (1.0 - acceptance**length) * _beside(beside, length, length)
    return (first + more) * (1.0 - acceptance)


@dataclass(frozen=True, slots=True)
class Choice:
    """The best schedule."""

    name: str
    length: int
    seconds: float
    """Per token, predicted."""
    without_lanes: float
    """The same of the best schedule without lanes."""

    @property
    def lanes_pay(self) -> bool:
        """Whether the draft should have a lane of its own."""
        return self.name == PEARL

    @property
    def gain(self) -> float:
        """How many times as fast as without lanes; 1 where they are not used."""
        return self.without_lanes / self.seconds


def choose(
    alone: LaneTimes,
    beside: LaneTimes,
    acceptance: float,
    *,
    lengths: Iterable[int] = range(1, 17),
    margin: float = 1.0,
) -> Choice:
    """No look-ahead, speculation or PEARL, and how far to look ahead.

    Args:
        alone: times of each model with the whole machine.
        beside: times while both run.
        acceptance: of a draft token, from 0 to below 1.
        lengths: draft tokens a round that are considered.
        margin: how many times as fast lanes must be to be chosen.

    Raises:
        InputError: the acceptance is out of range.
    """
    if not 0.0 <= acceptance < 1.0:
        raise InputError(f"is {acceptance}.", field="acceptance", fix="Give a number from 0 to below 1.")
    lengths = list(lengths)
    options = [(no_lookahead(alone), NONE, 0)]
    options += [(speculation(alone, length, acceptance), SPECULATION, length) for length in lengths]
    usual = min(options)
    lanes = min((pearl(beside, length, acceptance), PEARL, length) for length in lengths)
    best = lanes if lanes[0] * margin < usual[0] else usual
    return Choice(best[1], best[2], best[0], usual[0])


def _round_tokens(length: int, acceptance: float) -> float:
    return sum(acceptance**i for i in range(length + 1))


def _beside(times: LaneTimes, length: int, size: int) -> float:
    return max(length * times.draft, times.forward(size))
