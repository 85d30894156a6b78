"""Measures what steps cost on this machine, in a few seconds, and remembers it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from paceline.cache.block_manager import BlockManager
from paceline.engine.profile_cache import ProfileKey, load_profile, save_profile
from paceline.engine.types import TargetScores
from paceline.model.loader import LoadedModel
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput
from paceline.plan.cost_model import CostTable

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256)
_CONTEXT = 128
_LONG_CONTEXT = 1024
_SEQUENCES = (4, 16)
_REPEATS = 4
_MAX_SECONDS = 6.0

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
    key = profile_key(loaded)
    known = load_profile(key)
    if known is not None:
        return known
    table = measure_costs(
        runner, blocks, max_model_len, lambda done, total: on_progress(f"measuring step times ({done}/{total})")
    )
    table = replace(table, about={**key.describe(), "model": loaded.name})
    save_profile(key, table)
    return table


def profile_key(loaded: LoadedModel) -> ProfileKey:
    """What the costs of a model depend on."""
    device = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else ""
    return ProfileKey.of(loaded.config.to_dict(), str(loaded.dtype).removeprefix("torch."), device)


def measure_costs(
    runner: ModelRunner, blocks: BlockManager, max_model_len: int, on_progress: Progress = lambda *_: None
) -> CostTable:
    """Time forwards of many shapes and keep the fastest of each; the blocks used are given back.

    Rounds over all shapes are interleaved, so that a busy moment of the machine hits all alike, and end after a few
    seconds even on a slow one. The cache's content does not matter for the time.

    Raises:
        MemoryError: the KV cache cannot hold a single short sequence.
    """
    capacity = blocks.num_available * blocks.block_size
    context = min(_CONTEXT, max_model_len // 2, capacity // 2)
    shapes = list(_shapes(context, max_model_len, capacity, blocks.block_size))
    times: dict[Shape, float] = {}
    started = time.perf_counter()
    with _tables(blocks, shapes) as tables:
        _run(runner, tables, shapes[0])  # a first forward pays for what is set up once
        for repeat in range(_REPEATS):
            for i, shape in enumerate(shapes):
                seconds = _run(runner, tables, shape)
                times[shape] = min(seconds, times.get(shape, seconds))
                on_progress(repeat * len(shapes) + i + 1, _REPEATS * len(shapes))
            if time.perf_counter() - started > _MAX_SECONDS:
                break
    return _fit(times, context)


def _shapes(context: int, max_model_len: int, capacity: int, block_size: int) -> Iterator[Shape]:
    room = min(max_model_len, capacity)
    for n in SIZES:
        if context + n <= room:
            yield Shape(n, 1, context)
    for sequences in _SEQUENCES:
        if sequences * (-(-(context + 1) // block_size)) * block_size <= capacity:
            yield Shape(1, sequences, context)
    longer = min(_LONG_CONTEXT, room - 1)
    if longer >= 2 * context:
        yield Shape(1, 1, longer)


def _fit(times: dict[Shape, float], context: int) -> CostTable:
    """Separate what a forward's tokens, its sequences and their context cost."""
    chains = {s.tokens: t for s, t in times.items() if s.sequences == 1 and s.context == context}
    if len(chains) == 1:
        chains[2 * next(iter(chains))] = 2.0 * next(iter(chains.values()))
    sizes, seconds = np.array(sorted(chains)), np.array([chains[n] for n in sorted(chains)])
    longer = [(s.context - context, t - seconds[0]) for s, t in times.items() if s.context > context]
    per_context = max(0.0, *(extra / tokens for tokens, extra in longer)) if longer else 0.0
    wide = [(s.sequences, t) for s, t in times.items() if s.sequences > 1]
    own = [(t - float(np.interp(n, sizes, seconds))) / (n - 1) for n, t in wide]
    per_sequence = max(0.0, float(np.median(own)) - per_context * context) if own else 0.0
    bare = np.maximum(seconds - per_context * context, 0.1 * seconds)
    return CostTable(tuple(sizes.tolist()), tuple(bare.tolist()), per_sequence, per_context)


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
    started = time.perf_counter()
    positions = np.arange(shape.context, shape.context + shape.tokens)
    sequences = tuple(
        SequenceInput([0] * shape.tokens, positions, shape.context, table) for table in tables[: shape.sequences]
    )
    logits = runner.forward(ForwardBatch(sequences, range(shape.tokens * shape.sequences)))
    TargetScores(logits, (0,)).argmax.max()  # a step reads its logits, so its time includes that
    return time.perf_counter() - started
