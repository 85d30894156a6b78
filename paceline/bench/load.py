"""Load: many requests at once against several settings or servers, measured in turns by one client.

Every (repeat, load level) is run with all settings one after the other, in an order that rotates, with the same
requests in the same order. Latencies count from the moment a request was due, so a client that falls behind does not
hide a queue.

This module does not know who answers: it drives clients, and yields one value per run as soon as that run is complete.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from paceline.bench.arrivals import Closed, Point
from paceline.bench.load_timeline import Reliability, Timeline
from paceline.bench.workload import Prompts, Work, Workload

LEAST_REQUESTS = 8
REQUESTS_PER_USER = 4
OPEN_REQUESTS = 64
WARM_UP_TOKENS = 16
_WARM_UP = "warm-up"
_AFTER_FAILURE = 0.1
"""Seconds that a user waits after a failed request: a dead server fails thousands in a moment."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its sender saw it; times are seconds.

    `chunks` are (seconds since it was due, tokens) of everything that arrived; with speculation one chunk may carry
    several tokens. The counters of speculation are None where the server does not tell.
    """

    index: int
    due: float
    """Since the start of the run."""
    seconds: float
    """From due to the last chunk (or to the error)."""
    prompt_tokens: int = 0
    chunks: tuple[tuple[float, float], ...] = ()
    error: str | None = None
    exact: bool = True
    """Whether the server told how many tokens each chunk carried."""
    target_forwards: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer."""
        return round(sum(tokens for _, tokens in self.chunks))

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.chunks[0][0] if self.chunks else self.seconds

    @property
    def mean_itl(self) -> float | None:
        """Mean seconds per token after the first chunk; None for an answer of one chunk."""
        later = sum(tokens for _, tokens in self.chunks[1:])
        return (self.chunks[-1][0] - self.chunks[0][0]) / later if later else None


@dataclass(slots=True)
class Observed:
    """What a client learnt about its engine during a run. Counters are None where the server does not tell."""

    timeline: Timeline = field(default_factory=Timeline)
    reliability: Reliability = field(default_factory=Reliability)
    draft_tokens: int | None = None
    accepted_tokens: int | None = None


class Client(Protocol):
    """Sends requests to one engine or server."""

    @property
    def prompts(self) -> Prompts:
        """Makes the prompts it can send."""
        ...

    async def ask(self, work: Work, due: float, started: float, salt: str) -> Answer:
        """One request from first byte to last; a failure is an answer with an error.

        Args:
            work: the request.
            due: when it should have been sent, on `time.perf_counter`'s clock.
            started: when the run began, on the same clock.
            salt: requests with different salts share no cached state, where the engine can do that.
        """
        ...

    def watch(self, started: float) -> AbstractAsyncContextManager[Observed]:
        """Observe the engine; the value is complete when the context ends."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """One load level with one setting, once."""

    setting: str
    point: Point
    repeat: int
    seconds: float
    """From the first request to the end of the last."""
    answers: tuple[Answer, ...]
    observed: Observed


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Args:
        repeats: times to run every load level with every setting.
        requests: per run; None takes 4 per user (8 at least) in a closed loop, and 64 otherwise.
        duration: seconds in which requests are sent; what is under way then is waited for.
    """

    repeats: int = 1
    requests: int | None = None
    duration: float | None = None

    def count(self, point: Point) -> int | None:
        """Requests of a run; None is without end."""
        if self.requests is not None or self.duration is not None:
            return self.requests
        return max(LEAST_REQUESTS, REQUESTS_PER_USER * point.users) if isinstance(point, Closed) else OPEN_REQUESTS


def measure(
    clients: Mapping[str, Client],
    points: Sequence[Point],
    workload: Workload,
    extent: Extent,
    runner: asyncio.Runner,
    on_answer: Callable[[], None] = lambda: None,
) -> Iterator[Run]:
    """Run everything, interleaved.

    Args:
        clients: by setting; one at a time is used.
        points: load levels.
        workload: the requests.
        extent: repeats and lengths of runs.
        runner: whose event loop is used.
        on_answer: called whenever a request ends.
    """
    names = list(clients)
    for repeat in range(extent.repeats):
        for number, point in enumerate(points):
            shift = (repeat + number) % len(names)
            for name in names[shift:] + names[:shift]:
                yield runner.run(_run(name, clients[name], point, workload, extent, repeat, on_answer))


async def warm_up(clients: Mapping[str, Client], workload: Workload) -> dict[str, str]:
    """One short request each, so that first-use costs are not measured.

    Returns:
        The errors of those that failed.
    """
    errors: dict[str, str] = {}
    for name, client in clients.items():
        now = time.perf_counter()
        work = workload.warm_up(client.prompts, WARM_UP_TOKENS)
        answer = await client.ask(work, now, now, _WARM_UP)
        if answer.error is not None:
            errors[name] = answer.error
    return errors


async def _run(
    setting: str,
    client: Client,
    point: Point,
    workload: Workload,
    extent: Extent,
    repeat: int,
    on_answer: Callable[[], None],
) -> Run:
    times, queue = _schedule(point, workload, extent, repeat, client.prompts)
    salt = f"repeat {repeat}, {point.label}"
    answers: list[Answer] = []
    started = time.perf_counter()

    async def ask(work: Work, due: float) -> Answer:
        answers.append(answer := await client.ask(work, due, started, salt))
        on_answer()
        return answer

    async def user() -> None:
        for work in queue:
            if time.perf_counter() - started >= (extent.duration or float("inf")):
                return
            if (await ask(work, time.perf_counter())).error is not None:
                await asyncio.sleep(_AFTER_FAILURE)

    async with client.watch(started) as observed, _tasks() as group:
        if isinstance(point, Closed):
            for _ in range(point.users):
                group.create_task(user())
        for at, work in zip(times, queue, strict=False):
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            group.create_task(ask(work, started + at))
    seconds = max((a.due + a.seconds for a in answers), default=0.0)
    return Run(setting, point, repeat, seconds, tuple(sorted(answers, key=lambda a: a.index)), observed)


def _schedule(
    point: Point, workload: Workload, extent: Extent, repeat: int, prompts: Prompts
) -> tuple[list[float], Iterator[Work]]:
    """Arrival times (none in a closed loop) and requests; prompts are made before the clock runs where they can be."""
    works, count = workload.requests(repeat, prompts), extent.count(point)
    if isinstance(point, Closed):
        return [], works if count is None else iter(list(itertools.islice(works, count)))
    times = point.times((workload.seed, repeat), count=count, duration=extent.duration)
    return times, iter(list(itertools.islice(works, len(times))))


@asynccontextmanager
async def _tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error comes out by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
