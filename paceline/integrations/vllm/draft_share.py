"""What drafting adds to steps whose time is only known as a whole.

vLLM drafts at the end of a step, for the next one, and tells nobody how long that took. Steps in which nobody was
asked for drafts show what the rest takes; what others take beyond that is the drafter's. Each side takes half of every
surprise, and steps of both kinds come often enough (`trials.py`) to tell whose it was.
"""

from __future__ import annotations

import math

_RATE = 0.1
_FIRST_RATES = 8
_OWN = 0.5
"""Of a surprise that is taken for the drafter's."""
_LIMIT = 2.0
"""Times of the rest of the step that a draft is believed to take at most, in one measurement."""


class DraftShare:
    """Seconds of a draft, by order of magnitude of requests and by length asked for."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[float, int]] = {}

    def expected(self, requests: int, length: int) -> float:
        """Seconds of a draft; 0 where none was made."""
        if not length:
            return 0.0
        found = self._known.get((_level(requests), length))
        if found is None:
            near = [v for (level, _), v in self._known.items() if level == _level(requests)] or [*self._known.values()]
            return max((value for value, _ in near), default=0.0)
        return found[0]

    def split(self, seconds: float, rest: float, requests: int, length: int, measured: float = 0.0) -> float:
        """The draft's part of a step.

        Args:
            seconds: of the step.
            rest: what it is expected to take without a draft.
            requests: that decode.
            length: asked for.
            measured: what the drafter itself says; 0: nothing.
        """
        if not length:
            return 0.0
        key = (_level(requests), length)
        before, count = self._known.get(key, (self.expected(requests, length), 0))
        if measured > 0.0:
            drafted = min(measured, seconds)
        else:
            seen = min(max(seconds - rest, 0.0), _LIMIT * rest)
            drafted = before + _OWN * (seen - before) if count >= _FIRST_RATES else seen
        rate = max(_RATE, 1.0 / (count + 1)) if count < _FIRST_RATES else _RATE / _OWN
        self._known[key] = before + rate * (drafted - before), count + 1
        return min(self._known[key][0], seconds)


def _level(requests: int) -> int:
    return int(math.log2(max(requests, 1)) + 0.5)
