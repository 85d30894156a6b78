"""The runs of a replay bench, and its rows: every policy beside the best fixed length on the same load."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from paceline.bench.replay import NONE, ORACLE, Outcome, Replay, Setting
from paceline.bench.replay_traces import Recorded, Script, read_trace
from paceline.plan.cost_model import CostTable

BEST_FIXED = "best-fixed"
"""Stands for no look-ahead and every fixed length; its row is that of the best in hindsight."""


@dataclass(frozen=True, slots=True)
class Point:
    """One load: everything that all policies have in common."""

    path: str
    requests: int | None
    """Most requests taken from the trace file."""
    settings: tuple[Setting, ...]

    @property
    def name(self) -> str:
        """The trace's name."""
        return Path(self.path).stem


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on one load. Ratios are to the same load; None where what they compare with was not run."""

    trace: str
    drafter: str
    batch: int
    policy: str
    goodput: float
    """Tokens committed per second."""
    mean_latency: float | None
    """Seconds from a request's arrival to its last token, over the requests that ran from start to end."""
    p99_latency: float | None
    over_none: float | None
    """Goodput over that without look-ahead."""
    over_best_fixed: float | None
    latency_gain: float | None
    """Mean latency of the best fixed length over this one's."""
    gap_closed: float | None
    """Share of the way from the best fixed length to the oracle."""
    best_k: int | None
    """For `best-fixed`: the length that was best."""
    mean_accepted_length: float
    """Tokens per request and step."""
    drafted_per_step: float
    """Draft tokens verified per request and step."""
    slot_price: float | None
    """Mean survival of the last node kept."""
    tokens: int
    seconds: float
    steps: int


def expand(policies: Sequence[str], most: int) -> list[str]:
    """What has to be run for these policies."""
    wanted: list[str] = []
    for policy in policies:
        wanted += [NONE, *(f"fixed:k={k}" for k in range(1, most + 1))] if policy == BEST_FIXED else [policy]
    return list(dict.fromkeys(wanted))


def run_points(points: Sequence[Point], table: CostTable, workers: int) -> Iterator[tuple[Point, Setting, Outcome]]:
    """The outcome of every point's settings, as they become ready."""
    if workers == 1:
        for point in points:
            for setting in point.settings:
                yield point, setting, run_one(point, setting, table)
        return
    pool = ProcessPoolExecutor(workers, initializer=_leave_interrupts_to_the_parent)
    try:
        futures = {pool.submit(run_one, p, setting, table): (p, setting) for p in points for setting in p.settings}
        for future in as_completed(futures):
            yield *futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_one(point: Point, setting: Setting, table: CostTable) -> Outcome:
    """One run."""
    trace, script = _script(point.path, point.requests, setting.drafter)
    return Replay(trace, {script.name: script}, table).run(setting)


@lru_cache(maxsize=4)
def _trace(path: str, requests: int | None) -> list[Recorded]:
    return read_trace(path, limit=requests)


@lru_cache(maxsize=4)
def _script(path: str, requests: int | None, drafter: str) -> tuple[list[Recorded], Script]:
    trace = _trace(path, requests)
    return trace, Script(trace, drafter)


def rows_of(point: Point, outcomes: Mapping[str, Outcome], policies: Sequence[str]) -> list[Row]:
    """One row per policy that was asked for and has been run; `best-fixed` needs all lengths."""
    lengths = [s.policy for s in point.settings if s.policy == NONE or s.policy.startswith("fixed:")]
    complete = BEST_FIXED in policies and all(policy in outcomes for policy in lengths)
    best = max(lengths, key=lambda policy: _merit(point, outcomes[policy])) if complete else None
    rows = []
    for policy in policies:
        shown = best if policy == BEST_FIXED else policy
        if shown is not None and shown in outcomes:
            rows.append(_row(point, policy, outcomes, shown, best))
    return rows


def _merit(point: Point, outcome: Outcome) -> float:
    """What makes a fixed length the best: goodput, or with arrivals (which decide the goodput) a short latency."""
    latency = outcome.mean_latency
    return -latency if point.settings[0].arrivals and latency is not None else outcome.goodput


def _row(point: Point, policy: str, outcomes: Mapping[str, Outcome], shown: str, best: str | None) -> Row:
    setting, outcome = point.settings[0], outcomes[shown]
    fixed = None if best is None else outcomes[best]
    plain, oracle = outcomes.get(NONE), outcomes.get(ORACLE)
    gap = None if fixed is None or oracle is None else oracle.goodput - fixed.goodput
    decode_steps = max(outcome.tokens - outcome.accepted_tokens, 1)
    return Row(
        trace=point.name,
        drafter=setting.drafter,
        batch=setting.batch,
        policy=policy,
        goodput=outcome.goodput,
        mean_latency=outcome.mean_latency,
        p99_latency=float(np.percentile(outcome.latencies, 99)) if outcome.latencies else None,
        over_none=None if plain is None else outcome.goodput / plain.goodput,
        over_best_fixed=None if fixed is None else outcome.goodput / fixed.goodput,
        latency_gain=_ratio(None if fixed is None else fixed.mean_latency, outcome.mean_latency),
        gap_closed=None if not gap or gap < 0 or fixed is None else (outcome.goodput - fixed.goodput) / gap,
        best_k=_length(shown) if policy == BEST_FIXED else None,
        mean_accepted_length=outcome.tokens / decode_steps,
        drafted_per_step=outcome.draft_tokens / decode_steps,
        slot_price=float(np.mean(outcome.prices)) if outcome.prices else None,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        steps=outcome.steps,
    )


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _length(policy: str) -> int:
    return 0 if policy == NONE else int(policy.rpartition("=")[2])
