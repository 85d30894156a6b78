"""Measures the time of a decode step over the number of tokens in its forward, in a second or two at start."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from paceline.cache.block_manager import BlockManager
from paceline.engine.types import TargetScores
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput
from paceline.plan.step_time import PROFILE_SIZES, StepTime

_CONTEXT = 128
_REPEATS = 3
_MAX_SECONDS = 3.0


def measure_step_time(
    runner: ModelRunner, blocks: BlockManager, max_model_len: int, on_progress: Callable[[str], None]
) -> StepTime:
    """Run chains of each size behind a short context and take the fastest; the blocks used are given back.

    Rounds over all sizes are interleaved, so that a busy moment of the machine hits all alike, and end after a few
    seconds even on a slow one.
    """
    context = min(_CONTEXT, max_model_len // 2)
    sizes = [n for n in PROFILE_SIZES if context + n <= max_model_len] or [1]
    table: list[int] = []
    on_progress("measuring step times")
    if not blocks.grow(table, context + sizes[-1]):
        raise MemoryError("the KV cache is too small to measure step times in")
    try:
        _run(runner, table, 0, context)
        times: dict[int, list[float]] = {n: [] for n in sizes}
        started = time.perf_counter()
        for _ in range(_REPEATS):
            for n in sizes:
                times[n].append(_run(runner, table, context, n))
            if time.perf_counter() - started > _MAX_SECONDS:
                break
    finally:
        blocks.release(table)
    seconds_by_size = {n: min(values) for n, values in times.items()}
    if len(seconds_by_size) == 1:
        seconds_by_size[2] = 2 * seconds_by_size[1]
    return StepTime(seconds_by_size)


def _run(runner: ModelRunner, table: list[int], context: int, n: int) -> float:
    started = time.perf_counter()
    sequence = SequenceInput([0] * n, np.arange(context, context + n), context, table)
    logits = runner.forward(ForwardBatch((sequence,), range(n)))
    TargetScores(logits, (0,)).argmax.max()  # a step reads its logits, so its time includes that
    return time.perf_counter() - started
