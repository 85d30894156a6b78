"""How long steps take, as one who waits for tokens sees it.

With several batches in flight (async scheduling, pipeline parallelism) the time from scheduling a batch to its result
covers the work of others. What counts is how much later than the result before it came: while there was work all the
time, the time from result to result is what a batch took. After a pause it is the time since it was scheduled.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter


class StepClock:
    """Times steps; results come in the order in which steps were scheduled."""

    def __init__(self, now: Callable[[], float] = perf_counter) -> None:
        self._now = now
        self._last = 0.0
        self._busy = False

    def scheduled(self) -> float:
        """A step is being scheduled; returns when."""
        return self._now()

    def finished(self, scheduled: float, *, busy: bool) -> float:
        """Seconds of the step whose result has come.

        Args:
            scheduled: when it was scheduled.
            busy: whether there is more to do, so that nothing waits until the next result.
        """
        now = self._now()
        start = self._last if self._busy else max(scheduled, self._last)
        self._last, self._busy = now, busy
        return max(now - start, 1e-9)
