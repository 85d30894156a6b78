"""Bounds what looking ahead may cost where plain steps hide host work that steps with drafts do not.

There the time of a step depends on the steps around it, and a price put on draft nodes can be wrong by more than they
are worth. So looking is judged by the clock as well: seconds spent in steps in which drafters were asked, less those
in which plain steps would have made the same tokens. What is lost in a row is bounded, and is then made small by plain
steps, fifty times as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.engine.types import StepStats

_FIRST = 6
"""Plain steps that are taken before anything else with a new number of requests, ..."""
_EVERY = 64
"""... and most steps until the next one."""
_DISTURBED = 1.25
"""Times its mean that a plain step counts at most: it may take more one by one, but not less."""
_ALONE = 3
"""Plain steps in a row after which it is no use to wait for one behind another."""
_FADE = 0.9
_MOST_LOSS = 10.0
"""Plain steps' time that may be lost in a row."""
_MOST_CREDIT = 20.0
"""Likewise that gains of before may pay for: texts repeat themselves now and then only."""
_LONGEST = 8.0
"""Times a plain step, without drafting: what took longer was disturbed."""
_SHARE = 0.02
"""Of all time that may be lost."""


@dataclass(slots=True)
class _Level:
    """About so many requests."""

    plain_steps: int = 0
    latest: int = 0
    """The step of the last plain one that says what plain steps take."""
    seconds: float = 0.0
    """Fading mean of a plain step, ..."""
    count: int = 0
    """... of so many, ..."""
    behind: bool = False
    """... all of which were launched behind others, or none."""
    alone: int = 0
    """Plain steps in a row that were not."""

    def learn_plain(self, seconds: float, step: int, *, ahead: bool) -> None:
        """A plain step behind another tells what plain decoding takes; the first one after others waits for the host.
        Where none can be launched behind another, any of them does."""
        self.plain_steps += 1
        self.alone = 0 if ahead else self.alone + 1
        if ahead != self.behind and (ahead or self.alone >= _ALONE):
            self.behind, self.count = ahead, 0
        if ahead != self.behind:
            return
        self.latest = step
        self.count += 1
        taken = seconds if self.count <= _FIRST else min(seconds, _DISTURBED * self.seconds)
        self.seconds += max(1.0 / self.count, 1.0 - _FADE) * (taken - self.seconds)


@dataclass(slots=True)
class _Account:
    """Of numbers of requests within a factor of two."""

    loss: float = 0.0
    """In plain steps."""
    rest_until: int = 0


class Regret:
    """Plain steps, what looking has lost or won against them, and when neither is tried."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._accounts: dict[int, _Account] = {}

    def is_due(self, requests: int, step: int) -> bool:
        """Whether this step must be plain."""
        level = self._level(requests)
        return level.plain_steps < _FIRST or step > level.latest + _EVERY or step < self._account(requests).rest_until

    def seconds(self, requests: int) -> float | None:
        """What a plain step takes; None before enough were seen."""
        level = self._level(requests)
        return level.seconds if level.plain_steps >= _FIRST else None

    def learn(self, stats: StepStats, step: int) -> None:
        """Take in a step of decoding requests."""
        level = self._level(stats.num_sampling)
        if not stats.draft_seconds:
            level.learn_plain(stats.step_seconds, step, ahead=stats.ahead)
            return
        level.alone = 0
        if level.plain_steps >= _FIRST:
            drafting = sum(stats.draft_seconds.values())
            taken = min((stats.step_seconds - drafting) / level.seconds, _LONGEST) + drafting / level.seconds
            won = stats.num_committed / stats.num_sampling
            account = self._account(stats.num_sampling)
            account.loss = max(account.loss + taken - won, -_MOST_CREDIT)
            if account.loss > _MOST_LOSS:
                account.rest_until = step + round(account.loss / _SHARE)
                account.loss = 0.0

    def _level(self, requests: int) -> _Level:
        return self._levels.setdefault(level_of(requests), _Level())

    def _account(self, requests: int) -> _Account:
        return self._accounts.setdefault(requests.bit_length(), _Account())


def level_of(requests: int) -> int:
    """Numbers of requests that are alike: each by itself up to 8, then six to a doubling."""
    return requests if requests <= 8 else 8 + round(6.0 * float(np.log2(requests / 8.0)))
