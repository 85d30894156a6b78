"""Attention computed by segments of the context, merged exactly by log-sum-exp.

A segment is `attend` with `return_lse` over part of the keys:

- a cache-index range of every sequence: `batch.segment(key_start, key_end)`;
- a prefix that several sequences share, read once: a batch with one sequence whose rows are all of theirs, whose
  `block_tables` row is the prefix, `context_len = key_end = prefix_len`; their own indices lie beyond it, so nothing is
  masked. The second segment is then every sequence with `key_start = prefix_len`;
- sink and recent tokens: two ranges of one block table, `0 .. sink` and `key_end - recent .. key_end`.

Cache indices, and so causal order and windows, keep their meaning in all of them. A segment of arbitrary blocks can be
given as a shorter block table only where no window is used and all its keys are older than the queries, because a key's
index then no longer says its position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def merge_segments_kernel(
    outs, lses, out_ptr, lse_ptr, num_heads_total,
    SEGMENTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (rows * heads)."""
    at = tl.program_id(0).to(tl.int64)
    segment = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    from_ = segment * num_heads_total + at
    lse = tl.load(lses + from_, mask=segment < SEGMENTS, other=float("-inf"))
    ok = (lse > float("-inf"))[:, None] & (dim < HEAD_DIM)[None, :]
    out = tl.load(outs + from_[:, None] * HEAD_DIM + dim[None, :], mask=ok, other=0.0).to(tl.float32)
    largest = tl.max(lse, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp(lse - shift)
    total = tl.sum(weight, 0)
    safe = tl.where(total > 0.0, total, 1.0)
    merged = tl.sum(weight[:, None] * out, 0) / safe
    tl.store(out_ptr + at * HEAD_DIM + dim, merged.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(lse_ptr + at, tl.where(total > 0.0, shift + tl.log(safe), float("-inf")))


def merge_segments(
    outs: torch.Tensor,
    lses: torch.Tensor,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the keys of all segments of the same queries.

    Args:
        outs: Best in fp32; `attend` writes into a slice of it.  # [segments, T, heads, head_dim], contiguous
        lses: Natural logarithms; -inf where a row saw nothing in a segment.  # fp32 [segments, T, heads], contiguous
        out: Where to write; its type is the result's.  # [T, heads, head_dim], contiguous
        lse: Where to write.  # fp32 [T, heads], contiguous

    Returns:
        The output and its log-sum-exp; 0 and -inf where no segment had a visible key.
    """
    segments, rows, heads, head_dim = outs.shape
    assert outs.is_contiguous()
    assert lses.is_contiguous()
    out = torch.empty_like(outs[0]) if out is None else out
    lse = torch.empty_like(lses[0]) if lse is None else lse
    merge_segments_kernel[(rows * heads,)](
        outs, lses, out, lse, rows * heads, SEGMENTS=segments, HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_S=triton.next_power_of_2(segments), num_warps=1,
    )  # fmt: skip
    return out, lse
