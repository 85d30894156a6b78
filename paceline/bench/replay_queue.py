"""Who runs in a step of a replay: a closed loop or arrivals over time, with chunked prefill if wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paceline.bench.replay_traces import Recorded, running_id
from paceline.config import SamplingParams
from paceline.engine.request import Request
from paceline.engine.types import ScheduledBatch, ScheduledRequest


class ReplayQueue:
    """First come, first served.

    Args:
        trace: recorded requests, taken in shuffled order, again and again.
        batch: most requests that run at once; without arrivals this many always do.
        prefill: most prompt tokens of a step; 0 means that prompts count as read.
        arrivals: seconds at which requests arrive, ascending; empty for a closed loop, whose first requests start in
            mid-answer.
        seed: for the order and the first positions.
    """

    def __init__(
        self, trace: Sequence[Recorded], *, batch: int, prefill: int, arrivals: Sequence[float], seed: int
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._items = self._shuffled(trace)
        self._batch = batch
        self._prefill = prefill
        self._arrivals = tuple(arrivals)
        self._started = 0
        self._arrived: dict[Request, float] = {}
        self.running: list[Request] = []
        if not arrivals:
            for _ in range(batch):
                self._start(0.0, in_mid_answer=True)

    def next(self, now: float) -> tuple[ScheduledBatch, float] | None:
        """The next step's batch and when it can start; None when everything that arrives was served."""
        if not self._arrivals:
            while len(self.running) < self._batch:
                self._start(now)
        else:
            if not self.running and self._started < len(self._arrivals):
                now = max(now, self._arrivals[self._started])
            while (
                len(self.running) < self._batch
                and self._started < len(self._arrivals)
                and self._arrivals[self._started] <= now
            ):
                self._start(self._arrivals[self._started])
        return (self._schedule(), now) if self.running else None

    def finish(self, request: Request) -> float | None:
        """Remove a request; when it arrived, or None if it had started in mid-answer."""
        self.running.remove(request)
        return self._arrived.pop(request, None)

    def _schedule(self) -> ScheduledBatch:
        budget = self._prefill
        items = []
        for request in self.running:
            missing = len(request.token_ids) - request.num_computed
            if missing == 1:
                items.append(ScheduledRequest(request, request.num_computed, 1, True))
            elif budget:
                chunk = min(missing, budget)
                budget -= chunk
                items.append(ScheduledRequest(request, request.num_computed, chunk, chunk == missing))
        return ScheduledBatch(tuple(items))

    def _start(self, arrived: float, *, in_mid_answer: bool = False) -> None:
        item = next(self._items)
        done = int(self._rng.integers(len(item.output))) if in_mid_answer else 0
        request = Request(
            running_id(item, self._started),
            [*item.prompt, *item.output[:done]],
            len(item.prompt),
            SamplingParams(temperature=0.0, max_tokens=len(item.output)),
            seed=0,
        )
        if not self._prefill or in_mid_answer:
            request.num_computed = len(request.token_ids) - 1
        if not in_mid_answer:
            self._arrived[request] = arrived
        self._started += 1
        self.running.append(request)

    def _shuffled(self, trace: Sequence[Recorded]) -> Iterator[Recorded]:
        while True:
            for i in self._rng.permutation(len(trace)):
                yield trace[i]
