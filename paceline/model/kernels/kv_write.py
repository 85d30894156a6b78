"""Writing new keys and values into the pool, alone or in one kernel with the rotary embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paceline.model.kernels.overlap import launch_options, let_next_begin, wait_for_inputs


@triton.jit
def write_kv_kernel(
    key_ptr, value_ptr, key_pool, value_pool, slot_mapping,
    stride_key, stride_key_head, stride_value, stride_value_head, stride_slot, stride_pool_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    if slot < 0:
        return
    head = tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    ok = (head < KV_HEADS) & (dim < HEAD_DIM)
    to = slot * stride_slot + head * stride_pool_head + dim
    key = tl.load(key_ptr + row * stride_key + head * stride_key_head + dim, mask=ok)
    value = tl.load(value_ptr + row * stride_value + head * stride_value_head + dim, mask=ok)
    tl.store(key_pool + to, key, mask=ok)
    tl.store(value_pool + to, value, mask=ok)


@triton.jit
def _rotated(first, second, cos, sin, half, HALF: tl.constexpr):
    """Both halves of rotated heads, for the tables' rows at `cos` and `sin`."""
    cos_first = tl.load(cos + half, mask=half < HALF, other=0.0)
    cos_second = tl.load(cos + HALF + half, mask=half < HALF, other=0.0)
    sin_first = tl.load(sin + half, mask=half < HALF, other=0.0)
    sin_second = tl.load(sin + HALF + half, mask=half < HALF, other=0.0)
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def rope_write_kv_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, key_pool, value_pool, slot_mapping, positions, cos_table, sin_table,
    stride_query, stride_query_head, stride_key, stride_key_head, stride_value, stride_value_head,
    stride_out, stride_out_head, stride_slot, stride_pool_head,
    GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_G: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows, kv_heads): the query heads of one KV head, its key and its value."""
    if OVERLAP:
        let_next_begin()
        wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    slot = tl.load(slot_mapping + row)
    if slot < 0:
        return
    table = tl.load(positions + row).to(tl.int64) * (2 * HALF)
    half = tl.arange(0, BLOCK_HALF)[None, :]
    group = tl.arange(0, BLOCK_G)[:, None]
    ok = (group < GROUPS) & (half < HALF)
    kind = key_pool.dtype.element_ty

    head = kv_head * GROUPS + group
    at = query_ptr + row * stride_query + head * stride_query_head + half
    first = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    first, second = _rotated(first, second, cos_table + table, sin_table + table, half, HALF)
    to = out_ptr + row * stride_out + head * stride_out_head + half
    tl.store(to, first.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(to + HALF, second.to(out_ptr.dtype.element_ty), mask=ok)

    ok = half < HALF
    at = key_ptr + row * stride_key + kv_head * stride_key_head + half
    first = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    first, second = _rotated(first, second, cos_table + table, sin_table + table, half, HALF)
    to = slot * stride_slot + kv_head * stride_pool_head + half
    tl.store(key_pool + to, first.to(kind), mask=ok)
    tl.store(key_pool + to + HALF, second.to(kind), mask=ok)
    at = value_ptr + row * stride_value + kv_head * stride_value_head + half
    tl.store(value_pool + to, tl.load(at, mask=ok, other=0.0), mask=ok)
    tl.store(value_pool + to + HALF, tl.load(at + HALF, mask=ok, other=0.0), mask=ok)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store new rows of one layer; a slot of -1 is skipped.

    Args:
        key: [T, kv_heads, head_dim], any strides but the last; `value` alike.
        key_pool: [num_slots, kv_heads, head_dim], `value_pool` with the same strides.
        slot_mapping: int64 [T]
    """
    rows, kv_heads, head_dim = key.shape
    assert key_pool.stride() == value_pool.stride(), "the pools differ in layout"
    write_kv_kernel[(rows,)](
        key, value, key_pool, value_pool, slot_mapping,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), key_pool.stride(0), key_pool.stride(1),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        KV_HEADS=kv_heads, BLOCK_H=triton.next_power_of_2(kv_heads), num_warps=4,
    )  # fmt: skip


def rope_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """Rotate queries and keys (rotate-half) and store keys and values; rows with slot -1 are skipped altogether.

    Rotation is in fp32, with one rounding at the end: `transformers` rounds the tables and both products first.

    Args:
        query: [T, heads, head_dim], any strides but the last; `key` and `value` [T, kv_heads, head_dim] alike.
        cos: fp32 [max_positions, head_dim], contiguous; `sin` alike.
        positions: int32 or int64 [T]
        key_pool: [num_slots, kv_heads, head_dim], `value_pool` with the same strides.
        slot_mapping: int64 [T]
        out: Where to write the rotated queries; `query` itself is allowed.
        overlap: See `overlap.py`.

    Returns:
        The rotated queries.  # [T, heads, head_dim]
    """
    rows, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    assert key_pool.stride() == value_pool.stride(), "the pools differ in layout"
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    if out is None:
        out = torch.empty((rows, heads, head_dim), dtype=query.dtype, device=query.device)
    groups = heads // kv_heads
    rope_write_kv_kernel[(rows, kv_heads)](
        query, key, value, out, key_pool, value_pool, slot_mapping, positions, cos, sin,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        out.stride(0), out.stride(1), key_pool.stride(0), key_pool.stride(1),
        GROUPS=groups, HALF=head_dim // 2, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_G=triton.next_power_of_2(groups), OVERLAP=overlap, num_warps=1 if groups * head_dim <= 512 else 4,
        **launch_options(overlap),
    )  # fmt: skip
    return out
