"""Times the attention kernels against SDPA over a contiguous cache, after checking them against their twins.

python benchmarks/gpu/attention_kernels.py [--quick]

Microseconds a call, from CUDA events around replays of a CUDA graph of several calls; calls rotate over layers' pools
so that keys come from memory where a real model's would. GB/s counts the keys and values of the context once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from paceline.model.kernels.attend import Partials, attend
from paceline.model.kernels.batch import CHUNK_FROM, CHUNK_ROWS, DECODE_ROWS, SPLIT_KEYS, AttentionBatch
from paceline.model.kernels.host import BatchBuffers, BatchShape, Tree, programs_of
from paceline.model.kernels.kv_write import rope_write_kv
from paceline.model.kernels.layout import share_splits
from paceline.model.kernels.twins import attend_twin

CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
BLOCK_SIZE = 16
CACHE_BYTES = 256 << 20
"""Pools together are at least this large where memory allows: several times the second-level cache."""
MAX_LAYERS = 16


@dataclass(frozen=True)
class Model:
    """Attention's shape."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


MODELS = (Model("SmolLM2-135M", 9, 3, 64), Model("Llama-8B", 32, 8, 128))


def measure(calls: list[Callable[[], object]], seconds: float = 0.06) -> float:
    """Microseconds of one call, the median of five replays' means."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    once = _elapsed(graph, 1)
    replays = max(1, min(200, int(seconds * 1000 / 5 / max(once, 1e-3))))
    return 1000 * float(np.median([_elapsed(graph, replays) for _ in range(5)])) / replays / len(calls)


def _elapsed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def build(model: Model, num_new: int, context: int, batch: int, tree: bool) -> tuple[AttentionBatch, int]:
    """A batch of equal sequences over shuffled blocks, and the pool's slots."""
    blocks = -(-(context + num_new) // BLOCK_SIZE)
    groups = model.heads // model.kv_heads
    chunk = num_new >= CHUNK_FROM
    queries, programs = DECODE_ROWS // groups, programs_of(model.kv_heads)
    new, keys = np.full(batch, num_new), np.full(batch, context + num_new)
    each, longest = share_splits(new, keys, CHUNK_FROM - 1, queries, SPLIT_KEYS, programs)
    shape = BatchShape(
        num_new * batch,
        batch,
        blocks,
        BLOCK_SIZE,
        groups,
        tree_words=1 if tree else 0,
        max_tiles=0 if chunk else batch * -(-num_new // queries),
        max_splits=longest if longest > each else 1,
        kv_heads=model.kv_heads,
        max_chunk_tiles=batch * -(-num_new // (CHUNK_ROWS // groups)) if chunk else 0,
    )
    tables = np.random.default_rng(0).permutation(batch * blocks).reshape(batch, blocks)
    trees = [Tree(np.tri(num_new, dtype=np.bool_))] * batch if tree else []
    positions = np.tile(np.arange(context, context + num_new), batch)
    buffers = BatchBuffers(shape, CUDA)
    filled = buffers.fill([num_new] * batch, [context] * batch, tables.tolist(), positions, trees)
    return filled, batch * blocks * BLOCK_SIZE


def row(model: Model, num_new: int, context: int, batch: int, tree: bool = False) -> dict[str, object]:
    """One setting: kernel and SDPA."""
    filled, slots = build(model, num_new, context, batch, tree)
    pool_bytes = 2 * slots * model.kv_heads * model.head_dim * DTYPE.itemsize
    layers = max(1, min(MAX_LAYERS, -(-CACHE_BYTES // pool_bytes)))
    pools = torch.randn((layers, 2, slots, model.kv_heads, model.head_dim), dtype=DTYPE, device=CUDA)
    query = torch.randn((num_new * batch, model.heads, model.head_dim), dtype=DTYPE, device=CUDA)
    out = torch.empty_like(query)
    scale = model.head_dim**-0.5
    partials = None
    if filled.splits > 1 and num_new < CHUNK_FROM:
        partials = Partials.empty(len(query), model.heads, filled.splits, model.head_dim, CUDA)

    def ours(pool: torch.Tensor) -> Callable[[], object]:
        return lambda: attend(query, pool[0], pool[1], filled, scale=scale, out=out, partials=partials)

    def sdpa(pool: torch.Tensor) -> Callable[[], object]:
        used = pool[:, : batch * (slots // batch)].view(2, batch, -1, model.kv_heads, model.head_dim)
        keys, values = used[:, :, : context + num_new].transpose(2, 3)
        queries = query.view(batch, num_new, model.heads, model.head_dim).transpose(1, 2)
        causal = context == 0 and num_new > 1
        return lambda: scaled_dot_product_attention(
            queries, keys, values, scale=scale, enable_gqa=True, is_causal=causal
        )

    repeat = max(1, 8 // layers)
    us = measure([ours(pool) for pool in pools] * repeat)
    sdpa_us = measure([sdpa(pool) for pool in pools] * repeat)
    moved = 2 * batch * (context + num_new) * model.kv_heads * model.head_dim * DTYPE.itemsize
    return {
        "model": model.name, "new": num_new, "context": context, "batch": batch, "tree": tree, "splits": filled.splits,
        "us": round(us, 2), "gb_s": round(moved / us / 1e3, 1), "sdpa_us": round(sdpa_us, 2),
        "sdpa_note": "no mask" if tree else "", "ratio": round(sdpa_us / us, 2),
    }  # fmt: skip


def check(model: Model) -> float:
    """Largest difference from the twin over a tree batch and a chunk."""
    worst = 0.0
    for num_new, context, batch, tree in ((1, 700, 3, False), (20, 300, 2, True), (100, 50, 1, False)):
        filled, slots = build(model, num_new, context, batch, tree)
        pool = torch.randn((2, slots, model.kv_heads, model.head_dim), device=CUDA).to(DTYPE)
        query = torch.randn((num_new * batch, model.heads, model.head_dim), device=CUDA).to(DTYPE)
        out, _ = attend(query, pool[0], pool[1], filled, scale=model.head_dim**-0.5)
        expected, _ = attend_twin(query, pool[0], pool[1], filled, scale=model.head_dim**-0.5)
        worst = max(worst, float((out.float() - expected).abs().max()))
    return worst


def rope_row(model: Model, batch: int) -> dict[str, object]:
    """Rotation and KV write of decode steps."""
    filled, slots = build(model, 1, 128, batch, False)
    pool = torch.zeros((2, slots, model.kv_heads, model.head_dim), dtype=DTYPE, device=CUDA)
    qkv = torch.randn((batch, model.heads + 2 * model.kv_heads, model.head_dim), dtype=DTYPE, device=CUDA)
    query, key, value = qkv.split([model.heads, model.kv_heads, model.kv_heads], dim=1)
    table = torch.randn((4096, model.head_dim), device=CUDA)
    out = torch.empty_like(query)

    def call() -> object:
        return rope_write_kv(
            query, key, value, table, table, filled.positions, pool[0], pool[1], filled.slot_mapping, out
        )

    return {"model": model.name, "kernel": "rope_write_kv", "batch": batch, "us": round(measure([call] * 8), 2)}


def main() -> None:
    """Print one JSON line per setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batches 1 and 32, contexts 512 and 4096 only")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": str(DTYPE)}))
    for model in MODELS:
        print(json.dumps({"model": model.name, "largest_difference_from_twin": round(check(model), 5)}), flush=True)
        for batch in (1, 32) if quick else (1, 8, 32, 128):
            for context in (512, 4096) if quick else (128, 512, 4096, 16384):
                if batch * context * model.kv_heads * model.head_dim * 4 <= 40 << 30:
                    print(json.dumps(row(model, 1, context - 1, batch)), flush=True)
        for batch, nodes in ((1, 16), (1, 64), (8, 16), (32, 8)):
            print(json.dumps(row(model, nodes, 1024, batch, tree=True)), flush=True)
        print(json.dumps(row(model, 2048, 0, 1)), flush=True)
        for batch in (1, 32):
            print(json.dumps(rope_row(model, batch)), flush=True)


if __name__ == "__main__":
    main()
