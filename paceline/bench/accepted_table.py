"""Runs of `bench accept` in several processes, and its rows."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from paceline.bench.accepted import Accepted, AcceptSetting, replay_accepted
from paceline.bench.replay_traces import Recorded, read_trace


@dataclass(frozen=True, slots=True)
class Job:
    """A run on a file."""

    path: str
    requests: int | None
    """How many are taken from the file; None: all."""
    setting: AcceptSetting


@dataclass(frozen=True, slots=True)
class Row:
    """A run's result."""

    trace: str
    nodes: int
    """Most draft nodes of a step."""
    drafter: str
    mean_accepted_length: float
    over_best_single: float | None
    """Of a merged tree: over the best of its drafters alone, at the same budget; None where one is missing."""
    expected_length: float
    """What the estimates expected."""
    verified_per_step: float
    draft_seconds_per_step: float
    tokens: int
    steps: int


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Row]]:
    """The row of every job with its number, as they become ready."""
    if workers == 1:
        yield from ((i, run_one(job)) for i, job in enumerate(jobs))
        return
    pool = ProcessPoolExecutor(workers, initializer=_leave_interrupts_to_the_parent)
    try:
        futures = {pool.submit(run_one, job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_one(job: Job) -> Row:
    """One run."""
    total = Accepted()
    for found in replay_accepted(_trace(job.path, job.requests), job.setting):
        total = found
    return Row(
        trace=Path(job.path).stem,
        nodes=job.setting.nodes,
        drafter="+".join(job.setting.drafters),
        mean_accepted_length=total.mean_accepted_length,
        over_best_single=None,
        expected_length=1.0 + total.expected / total.steps,
        verified_per_step=total.nodes / total.steps,
        draft_seconds_per_step=total.draft_seconds / total.steps,
        tokens=total.tokens,
        steps=total.steps,
    )


@lru_cache(maxsize=4)
def _trace(path: str, requests: int | None) -> list[Recorded]:
    return read_trace(path, limit=requests)


def rows_of(rows: Sequence[Row]) -> list[Row]:
    """The rows by trace and budget, merged trees compared with their drafters alone."""
    found = {(row.trace, row.nodes, row.drafter): row for row in rows}
    order = {trace: i for i, trace in enumerate(dict.fromkeys(row.trace for row in rows))}
    compared = []
    for row in sorted(rows, key=lambda r: (order[r.trace], r.nodes)):
        alone = [found.get((row.trace, row.nodes, name)) for name in row.drafter.split("+")]
        lengths = [single.mean_accepted_length for single in alone if single is not None]
        whole = len(alone) > 1 and len(lengths) == len(alone)
        compared.append(replace(row, over_best_single=row.mean_accepted_length / max(lengths) if whole else None))
    return compared
