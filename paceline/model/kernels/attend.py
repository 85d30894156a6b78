"""The launcher of the attention kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton

from paceline.model.kernels.attention import attention_kernel, merge_splits_kernel
from paceline.model.kernels.batch import SPLIT_KEYS, AttentionBatch, Tiles
from paceline.model.kernels.overlap import launch_options

_MERGE_AT_ONCE = 4
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True, eq=False)
class Partials:
    """Where splits leave their results until they are merged; layers may share it."""

    out: torch.Tensor  # fp32 [rows of decode tiles, heads, splits, head_dim]
    lse: torch.Tensor  # fp32 [rows of decode tiles, heads, splits]; in units of log2

    @staticmethod
    def empty(rows: int, heads: int, splits: int, head_dim: int, device: torch.device) -> Partials:
        """Memory for so many rows; contents do not matter."""
        out = torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=device)
        return Partials(out, torch.empty((rows, heads, splits), dtype=torch.float32, device=device))


def attend(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    partials: Partials | None = None,
    return_lse: bool = False,
    overlap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of all rows over one layer's keys and values.

    Args:
        query: Any strides but the last.  # [T, heads, head_dim]
        key_pool: Slots hold `block * block_size + offset`.  # [num_slots, kv_heads, head_dim]
        value_pool: With the strides of `key_pool`.  # [num_slots, kv_heads, head_dim]
        window: A key is seen if its position is larger than the query's minus this.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        out: Where to write; fp32 keeps a segment exact for merging.  # [T, heads, head_dim], contiguous
        lse: Where to write the log-sum-exp.  # fp32 [T, heads], contiguous
        overlap: See `overlap.py`.
        partials: Workspace for at least `batch.splits` splits; allocated here if missing and needed.

    Returns:
        The output and, if asked for, the natural log-sum-exp of each row's scores. A row that sees no key gets 0 and
        -inf; padding rows are left as they are.  # [T, heads, head_dim], fp32 [T, heads]
    """
    rows, heads, head_dim = query.shape
    assert query.stride(2) == 1, "a head's elements must be adjacent"
    assert key_pool.stride() == value_pool.stride(), "the pools differ in layout"
    if out is None:
        out = torch.empty((rows, heads, head_dim), dtype=query.dtype, device=query.device)
    if lse is None and return_lse:
        lse = torch.empty((rows, heads), dtype=torch.float32, device=query.device)
    assert out.is_contiguous()
    assert lse is None or lse.is_contiguous()
    if batch.splits > 1:
        if partials is None:
            partials = Partials.empty(rows, heads, batch.splits, head_dim, query.device)
        assert partials.lse.shape[2] >= batch.splits, "the workspace is for fewer splits"
    for tiles in batch.tiles:
        if tiles.seq.shape[0]:
            _launch(query, key_pool, value_pool, batch, tiles, scale, window, softcap, out, lse, partials, overlap)
    return out, lse


def _launch(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    batch: AttentionBatch,
    tiles: Tiles,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    partials: Partials | None,
    overlap: bool,
) -> None:
    heads, head_dim = query.shape[1:]
    kv_heads = key_pool.shape[1]
    groups = heads // kv_heads
    block_m = max(16, triton.next_power_of_2(tiles.queries * groups))
    stride_splits = 1 if partials is None else partials.lse.shape[2]
    block_n, stages, warps = _key_block(block_m, head_dim, key_pool.element_size())
    stored = out if partials is None else partials.out
    common = {
        "NUM_HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "TILE_QUERIES": tiles.queries, "SPLIT_KEYS": SPLIT_KEYS if tiles.splits else 0, "STORE_LSE": lse is not None,
        "OVERLAP": overlap, **launch_options(overlap),
    }  # fmt: skip
    log_sums = out if lse is None else lse
    attention_kernel[(kv_heads * tiles.seq.shape[0],)](
        query, key_pool, value_pool, out, log_sums, stored, log_sums if partials is None else partials.lse,
        batch.query_start, batch.context_len, batch.key_start, batch.key_end, batch.block_tables, batch.positions,
        batch.tree_start, batch.tree_mask, batch.tree_positions, tiles.seq, tiles.start,
        tiles.split, tiles.each, scale, softcap or 0.0, query.stride(0), query.stride(1),
        key_pool.stride(0), key_pool.stride(1), batch.block_tables.shape[1], stride_splits,
        GROUPS=groups, MERGED=tiles.splits > 1, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_SIZE=batch.block_size,
        TREE_WORDS=batch.tree_mask.shape[1], WINDOW=window or 0, SOFTCAP=softcap is not None,
        PRECISION="tf32x3", WIDEN=_INTERPRETED and query.dtype == torch.bfloat16,
        num_warps=warps, num_stages=stages, **common,
    )  # fmt: skip
    if tiles.splits > 1:
        assert partials is not None
        merge_splits_kernel[(tiles.num_tiles * tiles.queries, heads)](
            partials.out, partials.lse, out, log_sums, batch.query_start, batch.key_start, batch.key_end,
            tiles.seq, tiles.start, tiles.split, tiles.each, stride_splits,
            AT_ONCE=_MERGE_AT_ONCE, num_warps=1, **common,
        )  # fmt: skip


def _key_block(block_m: int, head_dim: int, element_size: int) -> tuple[int, int, int]:
    """Keys of a block, stages of its loads, such that they fit in shared memory, and warps.

    A function of the tile's shape only, never of the batch: it decides the order of summation.
    """
    row_bytes = triton.next_power_of_2(head_dim) * element_size
    if block_m < 64:  # few programs run at decode, each waiting for memory: it asks for much at once
        return (128, 2, 4) if row_bytes <= 256 else (64, 3, 4) if row_bytes <= 512 else (32, 3, 4)
    warps = 8 if head_dim > 128 else 4
    return (64, 3, warps) if row_bytes <= 256 else (32, 3, warps) if row_bytes <= 512 else (16, 2, warps)
