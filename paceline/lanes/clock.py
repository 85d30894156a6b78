"""A deterministic event clock: lanes that take modelled time, jitter by a seed, lanes that die when they are told to.

Events lie in a heap of (time, number): what comes first happens first, ties in the order in which they were planned. A
job's work is done when its lane begins it, and is known to others when its time is over. Jitter of a job depends on
the seed, its lane and its number there, so one lane's luck does not move with what others do.
"""

from __future__ import annotations

import heapq
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.errors import LaneDiedError
from paceline.lanes.work import Job, Process, never

Seconds = Callable[[int], float]
"""How long a lane takes for so many tokens."""


@dataclass(eq=False)
class Lane:
    """One worker of the clock."""

    name: str
    seconds: Seconds
    newest_first: bool = False
    """Take the job that came last, not the one that came first: a control, it starves."""
    queue: deque[Job] = field(default_factory=deque)
    current: Job | None = None
    busy: float = 0.0
    """Seconds of work so far."""
    longest_wait: float = 0.0
    """Seconds that a job waited at most."""
    taken: int = 0
    dead: bool = False


class Clock:
    """Lanes in modelled time.

    Args:
        lanes: seconds by size, by name.
        jitter: jobs take up to that share longer.
        seed: of the jitter.
        deaths: when lanes die; their job and all later ones end with `LaneDiedError`.
        newest_first: lanes that serve the job that came last.
    """

    def __init__(
        self,
        lanes: Mapping[str, Seconds],
        *,
        jitter: float = 0.0,
        seed: int = 0,
        deaths: Mapping[str, float] | None = None,
        newest_first: tuple[str, ...] = (),
    ) -> None:
        self.lanes = {name: Lane(name, seconds, name in newest_first) for name, seconds in lanes.items()}
        self.now = 0.0
        self._jitter, self._seed = jitter, seed
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0
        self._waiting: dict[Job, list[Callable[[], None]]] = {}
        self._running = 0
        for name, at in (deaths or {}).items():
            self._plan(at, lambda name=name: self._die(self.lanes[name]))  # type: ignore[misc]

    def start(self, lane: str, size: int, work: Callable[[], Any], skip: Callable[[], bool] = never) -> Job:
        """Put work into a lane's queue; see `Lanes.start`."""
        job = Job(lane, size, work, skip, queued=self.now)
        worker = self.lanes[lane]
        worker.queue.append(job)
        self._plan(self.now, lambda: self._serve(worker))
        return job

    def promise(self) -> Job:
        """A job of no lane, done when `keep` is called: a signal between processes."""
        return Job("", 0, lambda: None, never, queued=self.now, begun=self.now)

    def keep(self, promise: Job) -> None:
        """Whoever waits for the promise goes on."""
        if not promise.done:
            self._end(promise)

    def spawn(self, process: Process) -> None:
        """Let a schedule run from now on."""
        self._running += 1
        self._plan(self.now, lambda: self._advance(process))

    def run(self) -> float:
        """Until nothing happens any more; when that is."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        assert not self._running, f"{self._running} schedules wait for something that never happens"
        return self.now

    def idle(self, lane: str, until: float) -> float:
        """Share of the time until then in which a lane had nothing to do."""
        return 1.0 - self.lanes[lane].busy / until

    def _plan(self, at: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, self._planned, event))
        self._planned += 1

    def _advance(self, process: Process) -> None:
        try:
            jobs = [job for job in next(process) if not job.done]
        except StopIteration:
            self._running -= 1
            return
        if not jobs:
            self._plan(self.now, lambda: self._advance(process))
            return
        left = len(jobs)

        def one_done() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._advance(process)

        for job in jobs:
            self._waiting.setdefault(job, []).append(one_done)

    def _serve(self, lane: Lane) -> None:
        """Begin the next job of a lane that is free."""
        while lane.queue and lane.current is None:
            job = lane.queue.pop() if lane.newest_first else lane.queue.popleft()
            job.begun = self.now
            lane.longest_wait = max(lane.longest_wait, self.now - job.queued)
            if lane.dead:
                job.error = LaneDiedError(f"the lane {lane.name} has died.")
                self._end(job)
            elif job.skip():
                self._end(job)
            else:
                self._begin(lane, job)

    def _begin(self, lane: Lane, job: Job) -> None:
        try:
            job.value = job.work()
        except Exception as error:
            job.error = error
        lane.current = job
        seconds = lane.seconds(job.size) * self._factor(lane)
        lane.busy += seconds
        self._plan(self.now + seconds, lambda: self._finish(lane, job))

    def _finish(self, lane: Lane, job: Job) -> None:
        if lane.current is job:  # and did not die with its lane
            lane.current = None
            self._end(job)
            self._serve(lane)

    def _end(self, job: Job) -> None:
        job.ended = self.now
        for resume in self._waiting.pop(job, ()):
            self._plan(self.now, resume)

    def _factor(self, lane: Lane) -> float:
        lane.taken += 1
        if not self._jitter:
            return 1.0
        place = [self._seed, zlib.crc32(lane.name.encode()), lane.taken]
        return 1.0 + self._jitter * float(np.random.default_rng(place).random())

    def _die(self, lane: Lane) -> None:
        lane.dead = True
        job, lane.current = lane.current, None
        if job is not None:
            job.value, job.error = None, LaneDiedError(f"the lane {lane.name} died.")
            self._end(job)
        self._serve(lane)
