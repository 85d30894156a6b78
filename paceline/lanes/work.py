"""What a schedule runs on: named lanes that take work in their order. A schedule is a generator that waits for jobs.

    job = lanes.start("target", size, work)     # work() runs when the lane gets to it
    yield (job,)                                # until it is done
    job.value, job.error                        # one of them

The same generator runs on the event clock (`clock.py`), where `size` says how long a job takes, and on threads
(`threads.py`), where it takes as long as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(eq=False, slots=True)
class Job:
    """Work that was given to a lane."""

    lane: str
    size: int
    work: Callable[[], Any]
    skip: Callable[[], bool]
    queued: float = 0.0
    begun: float | None = None
    """When the lane got to it, in seconds; None as long as it waits."""
    ended: float | None = None
    value: Any = None
    error: Exception | None = None
    """Why there is no value: the work failed, or its lane is dead."""

    @property
    def done(self) -> bool:
        """Whether there is a value or an error."""
        return self.ended is not None

    def result(self) -> Any:
        """The value.

        Raises:
            Exception: what went wrong.
        """
        if self.error is not None:
            raise self.error
        return self.value


Process = Generator[Sequence[Job], None, None]
"""A schedule: it yields jobs, and goes on when all of them are done."""


def never() -> bool:
    """Of a job that nobody will call off."""
    return False


class Lanes(Protocol):
    """Workers with a queue each."""

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        ...

    def start(self, lane: str, size: int, work: Callable[[], Any], skip: Callable[[], bool] = never) -> Job:
        """Put work into a lane's queue.

        Args:
            lane: its name.
            size: tokens through the lane's model.
            work: what is to be done; what it raises becomes the job's error.
            skip: asked when the lane gets to it; True: nothing is done and no time passes.
        """
        ...


def through(
    lanes: Lanes, stages: Sequence[str], size: int, work: Callable[[], Any], skip: Callable[[], bool] = never
) -> Generator[Sequence[Job], None, Job]:
    """Send work through the stages of a pipeline; the last one does it.

    Returns:
        The last stage's job.
    """
    for stage in stages[:-1]:
        yield (lanes.start(stage, size, lambda: None, skip),)
    job = lanes.start(stages[-1], size, work, skip)
    yield (job,)
    return job
