"""A client of an engine in this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np

from paceline.bench.load import Answer, Observed
from paceline.bench.load_timeline import Timeline
from paceline.bench.workload import TokenPrompts, Work
from paceline.config import SamplingParams
from paceline.engine.async_engine import AsyncEngine
from paceline.engine.engine import Engine
from paceline.engine.request import Request
from paceline.engine.types import RequestOutput, StepStats
from paceline.errors import RequestError
from paceline.llm import LLM, make_requests

_STEPS_PER_BIN = 4


class LocalClient:
    """Asks an `LLM`'s engine, which nobody else may use until `close`.

    Args:
        llm: the model.
        params: sampling options; length and seed are set request by request.
    """

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self.prompts = TokenPrompts(llm.tokenizer)
        self._tokenizer = llm.tokenizer
        self._params = params
        self._watcher: StepWatcher | None = None
        self._ids = itertools.count()
        self._engine = AsyncEngine(llm.engine, self._on_news)

    async def ask(self, work: Work, due: float, started: float, salt: str) -> Answer:
        """See `load.Client`.

        Raises:
            EngineDeadError: the engine has stopped.
        """
        seed = None if self._params.seed is None else self._params.seed + work.index
        params = replace(self._params, max_tokens=work.max_tokens, seed=seed)
        (request,) = make_requests(self._tokenizer, work.prompt, params, salt, f"load-{next(self._ids)}")
        chunks: list[tuple[float, float]] = []
        error: str | None = None
        try:
            async for news in self._engine.generate(request):
                if news.token_ids:
                    chunks.append((time.perf_counter() - due, len(news.token_ids)))
                error = news.error
        except RequestError as refused:
            error = str(refused)
        return Answer(
            index=work.index,
            due=due - started,
            seconds=chunks[-1][0] if chunks and error is None else time.perf_counter() - due,
            prompt_tokens=request.prompt_len,
            chunks=tuple(chunks),
            error=error,
            target_forwards=request.stats.target_forwards,
            draft_tokens=request.stats.draft_tokens,
            accepted_tokens=request.stats.accepted_tokens,
        )

    @asynccontextmanager
    async def watch(self, started: float) -> AsyncIterator[Observed]:
        """See `load.Client`; every step that brings news is a sample."""
        self._watcher = StepWatcher(self._engine.engine, started)
        try:
            yield self._watcher.observed
        finally:
            self._watcher = None

    def close(self) -> None:
        """Cancel what runs and end the engine's thread."""
        self._engine.shutdown()

    def _on_news(self, _request: Request, _news: RequestOutput) -> None:
        if self._watcher is not None:
            self._watcher.look()


class StepWatcher:
    """Turns the statistics of steps into a timeline; called in the engine's thread.

    Args:
        engine: what is watched.
        started: when the run began, on `time.perf_counter`'s clock.
    """

    def __init__(self, engine: Engine, started: float) -> None:
        self.observed = Observed(Timeline(per_bin=_STEPS_PER_BIN), draft_tokens=0, accepted_tokens=0)
        self._engine = engine
        self._started = started
        self._before = started
        self._seen = engine.last_stats

    def look(self) -> None:
        """Take in the last step unless it is known already."""
        stats = self._engine.last_stats
        if stats is None or stats is self._seen:
            return
        self._seen = stats
        now = time.perf_counter()
        scheduler = self._engine.stages.scheduler
        sample = {
            "running": (len(scheduler.running), 1.0),
            "waiting": (len(scheduler.waiting), 1.0),
            "tokens_per_second": (stats.num_committed, now - self._before),
            "draft_nodes": (stats.num_draft_nodes, stats.num_sampling),
            "looks_ahead": (float(stats.num_draft_nodes > 0), 1.0),
            **_plan(stats, self._engine.drafter_names),
            **self._labels(stats),
        }
        self.observed.timeline.add(now - self._started, sample)
        self._before = now

    def _labels(self, stats: StepStats) -> dict[str, tuple[float, float]]:
        """Acceptance of the labelled nodes by drafter (given that their parents were accepted)."""
        labels = stats.labels
        if not len(labels):
            return {}
        self.observed.reliability.add(labels.names, labels.drafter, labels.predicted, labels.accepted)
        seen = np.bincount(labels.drafter, minlength=len(labels.names)).tolist()
        accepted = np.bincount(labels.drafter[labels.accepted], minlength=len(labels.names)).tolist()
        return {f"acceptance/{name}": (a, n) for name, a, n in zip(labels.names, accepted, seen, strict=True) if n}


def _plan(stats: StepStats, drafters: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """What the plan decided: the price of a slot, who was asked, and whose nodes were verified."""
    found: dict[str, tuple[float, float]] = {}
    for name in drafters:
        found[f"asked/{name}"] = (float(name in stats.draft_seconds), 1.0)
        found[f"used/{name}"] = (float(stats.gains.get(name, 0.0) > 0), 1.0)
    if stats.slot_price is not None:
        found["slot_price"] = (stats.slot_price, 1.0)
    return found
