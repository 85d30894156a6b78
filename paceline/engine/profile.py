"""Measures what steps cost on this machine, in a few seconds, and remembers it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from paceline.cache.block_manager import BlockManager
from paceline.engine.profile_cache import ProfileKey, load_profile, save_profile
from paceline.engine.types import TargetScores
from paceline.model.loader import LoadedModel
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput
from paceline.plan.cost_model import CostTable

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
CONTEXTS = (512, 1024)
SEQUENCES = (4, 16)
_CONTEXT = 128
_REPEATS = 5
_FIRST_SECONDS = 3.0
"""After which no larger shape is begun: a slow machine measures fewer."""
_BRIEF = 4.0
"""Times of the shortest forward up to which one is measured again: where small differences matter."""
_MAX_SECONDS = 6.0
"""After which nothing is measured again."""

Progress = Callable[[int, int], None]
"""Called with the measurements done and those that there may be."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One forward to time: `sequences` of `tokens` new tokens each, behind `context` ones."""

    tokens: int
    sequences: int
    context: int


def cost_table(
    loaded: LoadedModel,
    runner: ModelRunner,
    blocks: BlockManager,
    max_model_len: int,
    on_progress: Callable[[str], None] = lambda _: None,
) -> CostTable:
    """The costs of this model on this machine: remembered, or measured now and remembered."""
    known = load_profile(profile_key(loaded, runner, blocks, max_model_len))
    if known is not None:
        return known
    return new_cost_table(
        loaded,
        runner,
        blocks,
        max_model_len,
        lambda done, total: on_progress(f"measuring step times ({done}/{total})"),
    )


def new_cost_table(
    loaded: LoadedModel, runner: ModelRunner, blocks: BlockManager, max_model_len: int, on_progress: Progress
) -> CostTable:
    """The costs of this model on this machine, measured now and remembered."""
    key = profile_key(loaded, runner, blocks, max_model_len)
    table = measure_costs(runner, blocks, max_model_len, on_progress)
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    table = replace(table, about={"model": loaded.name, "measured_at": made, **key.describe(), **table.about})
    save_profile(key, table)
    return table


def profile_key(loaded: LoadedModel, runner: ModelRunner, blocks: BlockManager, max_model_len: int) -> ProfileKey:
    """What the costs of a model depend on."""
    device = f"{torch.cuda.get_device_name(loaded.device)}, {runner.way}" if loaded.device.type == "cuda" else ""
    longest = min(max_model_len, blocks.num_blocks * blocks.block_size, _CONTEXT + SIZES[-1])
    return ProfileKey.of(loaded.config.to_dict(), loaded.precision, device, longest)


def measure_costs(
    runner: ModelRunner, blocks: BlockManager, max_model_len: int, on_progress: Progress = lambda *_: None
) -> CostTable:
    """Time forwards of many shapes and keep the fastest of each; the blocks used are given back.

    Shapes are measured in turn and then again, so that a busy moment of the machine hits all alike. Small ones come
    first, and a slow machine leaves out large ones and repeats. The cache's content does not matter for the time.

    Raises:
        MemoryError: the KV cache cannot hold a short sequence.
    """
    capacity = blocks.num_available * blocks.block_size
    context = min(_CONTEXT, max_model_len // 2, capacity // 2)
    shapes = _shapes(context, min(max_model_len, capacity), blocks.blocks_for, blocks.num_available)
    with _tables(blocks, shapes) as tables:
        times = _time(lambda shape: _run(runner, tables, shape), shapes, on_progress)
    return _fit(times, context)


def _time(run: Callable[[Shape], float], shapes: Sequence[Shape], on_progress: Progress) -> dict[Shape, float]:
    """The fastest time of each shape that there was time for."""
    run(shapes[0])  # a first forward pays for what is set up once, such as compiling for this CPU
    started = time.perf_counter()
    times: dict[Shape, float] = {}
    for shape in shapes:
        if len(times) >= 2 and time.perf_counter() - started > _FIRST_SECONDS:
            break
        times[shape] = run(shape)
        on_progress(len(times), _REPEATS * len(shapes))
    measured, limit = list(times), _BRIEF * min(times.values())
    last = max(i for i, shape in enumerate(measured) if times[shape] <= limit)  # one before it met a busy moment
    again = measured[: last + 1] * (_REPEATS - 1)
    total = len(times) + len(again)
    for done, shape in enumerate(again, start=len(times) + 1):
        if time.perf_counter() - started > _MAX_SECONDS:
            on_progress(total, total)
            break
        times[shape] = min(times[shape], run(shape))
        on_progress(done, total)
    return times


def _shapes(context: int, room: int, blocks_for: Callable[[int], int], num_blocks: int) -> list[Shape]:
    """What to time where one sequence may have `room` tokens, in ascending order of new tokens."""
    shapes = [Shape(n, 1, context) for n in SIZES if context + n <= room]
    longest = max((s.tokens for s in shapes), default=1) + context
    for length in CONTEXTS:
        if 2 * context <= length < room:
            shapes.append(Shape(1, 1, length))
            longest = max(longest, length + 1)
    for sequences in SEQUENCES:
        if blocks_for(longest) + (sequences - 1) * blocks_for(context + 1) <= num_blocks:
            shapes.append(Shape(1, sequences, context))
    return sorted(shapes, key=lambda s: (s.tokens * s.sequences, s.context)) or [Shape(1, 1, context)]


def _fit(times: dict[Shape, float], context: int) -> CostTable:
    """Separate what a forward's tokens, its sequences and their context cost."""
    chains = {s.tokens: t for s, t in times.items() if s.sequences == 1 and s.context == context}
    if len(chains) == 1:
        chains[2 * next(iter(chains))] = 2.0 * next(iter(chains.values()))
    sizes, seconds = np.array(sorted(chains)), np.array([chains[n] for n in sorted(chains)])
    longer = [(s.context, t) for s, t in times.items() if s.context > context]
    per_context = max(0.0, _slope([(context, float(seconds[0])), *longer])) if longer else 0.0
    wide = [(s.sequences, t) for s, t in times.items() if s.sequences > 1]
    own = [(t - float(np.interp(n, sizes, seconds))) / (n - 1) for n, t in wide]
    per_sequence = max(0.0, float(np.median(own)) - per_context * context) if own else 0.0
    bare = np.maximum(seconds - per_context * context, 0.1 * seconds)
    about: dict[str, Any] = {
        "context": context,
        "measured_tokens": [[int(n), float(t)] for n, t in zip(sizes, seconds, strict=True)],
        "measured_context": [[c, t] for c, t in sorted([(context, float(seconds[0])), *longer])],
        "measured_sequences": [[n, t] for n, t in sorted(wide)],
    }
    return CostTable(tuple(sizes.tolist()), tuple(bare.tolist()), per_sequence, per_context, about=about)


def _slope(points: Sequence[tuple[int, float]]) -> float:
    x, y = np.array(points, dtype=np.float64).T
    return float(np.polyfit(x, y, 1)[0])


@contextmanager
def _tables(blocks: BlockManager, shapes: Sequence[Shape]) -> Iterator[list[list[int]]]:
    """Block tables, as many and as long as any shape needs."""
    most = max(shape.sequences for shape in shapes)
    tables: list[list[int]] = [[] for _ in range(most)]
    try:
        for i, table in enumerate(tables):
            if not blocks.grow(table, max(s.context + s.tokens for s in shapes if s.sequences > i)):
                raise MemoryError("the KV cache is too small to measure step times in")
        yield tables
    finally:
        for table in tables:
            blocks.release(table)


def _run(runner: ModelRunner, tables: list[list[int]], shape: Shape) -> float:
    """Seconds of one forward, its logits read."""
    started = time.perf_counter()
    positions = np.arange(shape.context, shape.context + shape.tokens)
    sequences = tuple(
        SequenceInput([0] * shape.tokens, positions, shape.context, table) for table in tables[: shape.sequences]
    )
    logits = runner.forward(ForwardBatch(sequences, range(shape.tokens * shape.sequences)))
    TargetScores(logits, (0,)).argmax.max()  # a step reads its logits, so its time includes that
    return time.perf_counter() - started
