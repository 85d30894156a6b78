"""Which steps are made only to learn what steps cost.

Asking for drafts costs time in the step that drafts, verifying them in the next. The pattern `ask, ask, rest, rest`
meets all four combinations. It runs for the first steps at every order of magnitude of requests, and seldom later.
"""

from __future__ import annotations

import math

_PATTERN = (True, True, False, False)
FIRST = 16
_EVERY = 512
"""Steps after which a pair of trial steps tells whether drafts still cost what they did."""
_PAUSE = 128
"""Steps after which one goes without asking, so that the two kinds stay apart."""


class Trials:
    """Counts steps by order of magnitude of requests."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}

    def on(self, requests: int) -> bool:
        """Count a step, and say whether it must be planned for the sake of a trial."""
        level = _level(requests)
        step = self._steps[level] = self._steps.get(level, -1) + 1
        return step <= FIRST or step % _EVERY < 3 or step % _PAUSE == 0

    def ask(self, requests: int) -> bool | None:
        """Whether to ask for drafts in this step whatever they are worth (None: as the plan says)."""
        step = self._steps.get(_level(requests), 0)
        if step < FIRST:
            return _PATTERN[step % len(_PATTERN)]
        if step % _EVERY < 2:
            return True
        return False if step % _PAUSE == 0 else None


def _level(requests: int) -> int:
    return int(math.log2(max(requests, 1)) + 0.5)
