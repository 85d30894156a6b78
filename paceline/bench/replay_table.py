"""The runs of a replay bench, and its rows: every policy beside the best fixed length on the same load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def run_points(points: Sequence[Point], table: CostTable, workers: int) -> Iterator[tuple[Point, list[Outcome]]]:
    """The outcomes of every point's settings, as they become ready."""
    if workers == 1:
        for point in points:
            yield point, run_point(point, table)
        return
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(run_point, point, table): point for point in points}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run_point(point: Point, table: CostTable) -> list[Outcome]:
    """All settings of one point."""
    trace, script = _script(point.path, point.requests, point.settings[0].drafter)
    replay = Replay(trace, {script.name: script}, table)
    return [replay.run(setting) for setting in point.settings]


@lru_cache(maxsize=4)
def _trace(path: str, requests: int | None) -> list[Recorded]:
    return read_trace(path, limit=requests)


@lru_cache(maxsize=4)
def _script(path: str, requests: int | None, drafter: str) -> tuple[list[Recorded], Script]:
    trace = _trace(path, requests)
    return trace, Script(trace, drafter)


def rows_of(point: Point, outcomes: Sequence[Outcome], policies: Sequence[str]) -> list[Row]:
    """One row per policy that was asked for."""
    by_policy = {setting.policy: outcome for setting, outcome in zip(point.settings, outcomes, strict=True)}
    fixed = {p: o.goodput for p, o in by_policy.items() if p == NONE or p.startswith("fixed:")}
    best = max(fixed, key=lambda p: fixed[p]) if BEST_FIXED in policies else None
    rows = []
    for policy in policies:
        shown = best if policy == BEST_FIXED else policy
        assert shown is not None, "best-fixed was asked for"
        rows.append(_row(point, policy, by_policy, shown, best))
    return rows


def _row(point: Point, policy: str, outcomes: dict[str, Outcome], shown: str, best: str | None) -> Row:
    setting, outcome = point.settings[0], outcomes[shown]
    fixed = None if best is None else outcomes[best].goodput
    plain = outcomes[NONE].goodput if NONE in outcomes else None
    oracle = outcomes[ORACLE].goodput if ORACLE in outcomes else None
    behind = None if fixed is None or oracle is None or oracle <= fixed else oracle - fixed
    return Row(
        trace=point.name,
        drafter=setting.drafter,
        batch=setting.batch,
        policy=policy,
        goodput=outcome.goodput,
        mean_latency=outcome.mean_latency,
        p99_latency=float(np.percentile(outcome.latencies, 99)) if outcome.latencies else None,
        over_none=None if plain is None else outcome.goodput / plain,
        over_best_fixed=None if fixed is None else outcome.goodput / fixed,
        gap_closed=None if behind is None or fixed is None else (outcome.goodput - fixed) / behind,
        best_k=_length(shown) if policy == BEST_FIXED else None,
        mean_accepted_length=outcome.tokens / max(outcome.tokens - outcome.accepted_tokens, 1),
        drafted_per_step=outcome.draft_tokens / max(outcome.tokens - outcome.accepted_tokens, 1),
        slot_price=float(np.mean(outcome.prices)) if outcome.prices else None,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        steps=outcome.steps,
    )


def _length(policy: str) -> int:
    return 0 if policy == NONE else int(policy.rpartition("=")[2])
