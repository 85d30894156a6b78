"""Lanes that are threads: a schedule that ran on the clock runs here on real models, at the same time as each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from paceline.lanes.work import Job, Process, never


class Threads:
    """One thread for each group of lanes.

    Args:
        lanes: their names; those in one group share a thread, and so take turns.
        prepare: called in each thread before its first job, to set how many cores it may use.
    """

    def __init__(self, *lanes: Sequence[str], prepare: Callable[[], None] = lambda: None) -> None:
        self._pools: dict[str, ThreadPoolExecutor] = {}
        for group in lanes:
            pool = ThreadPoolExecutor(1, f"paceline-{group[0]}", initializer=prepare)
            self._pools |= dict.fromkeys(group, pool)
        self._futures: dict[Job, Future[None]] = {}
        self._began = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds since the threads were made."""
        return time.perf_counter() - self._began

    def start(self, lane: str, size: int, work: Callable[[], Any], skip: Callable[[], bool] = never) -> Job:
        """Put work into a lane's queue; see `Lanes.start`."""
        job = Job(lane, size, work, skip, queued=self.now)
        self._futures[job] = self._pools[lane].submit(self._do, job)
        return job

    def run(self, process: Process) -> None:
        """Drive a schedule to its end."""
        for jobs in process:
            for job in jobs:
                future = self._futures.pop(job, None)
                if future is not None:
                    future.result()

    def close(self) -> None:
        """End the threads, after what they are doing."""
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, job: Job) -> None:
        job.begun = self.now
        try:
            if not job.skip():
                job.value = job.work()
        except Exception as error:
            job.error = error
        job.ended = self.now
