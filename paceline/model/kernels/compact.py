"""Moving the KV of accepted draft nodes to the front of their tree, over all layers in one kernel.

Why moves may share memory. In one request sources increase, targets increase, and no target lies after its source. So
the target of move i can be the source of an *earlier* move only (a later source lies after source i, hence after target
i), and blocks of different requests' new tokens are never shared. A program owns some elements of every slot and takes
the moves in order, `BLOCK_MOVES` at a time: it reads them all, waits for its threads, writes them all. Within a group
everything is read before it is written; a later group reads nothing that an earlier one wrote.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_ELEMENTS = 128
_BLOCK_MOVES = 16


@triton.jit(do_not_specialize=["num_moves"], do_not_specialize_on_alignment=["sources", "targets"])
def compact_kernel(
    pool, sources, targets, num_moves, stride_plane, stride_slot, row_elements,
    BLOCK_MOVES: tl.constexpr, BLOCK_ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Grid (planes, blocks of a slot's elements); a plane is the keys or the values of one layer."""
    element = tl.program_id(1) * BLOCK_ELEMENTS + tl.arange(0, BLOCK_ELEMENTS)
    base = pool + tl.program_id(0).to(tl.int64) * stride_plane + element[None, :]
    for first in range(0, num_moves, BLOCK_MOVES):
        move = first + tl.arange(0, BLOCK_MOVES)
        source = tl.load(sources + move, mask=move < num_moves, other=-1)
        target = tl.load(targets + move, mask=move < num_moves, other=-1)
        ok = ((source >= 0) & (target >= 0))[:, None] & (element < row_elements)[None, :]
        rows = tl.load(base + source[:, None] * stride_slot, mask=ok)
        tl.debug_barrier()
        tl.store(base + target[:, None] * stride_slot, rows, mask=ok)
        tl.debug_barrier()


def compact(pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy slots in all layers.

    Args:
        pool: `PagedKV.slots`.  [layers, 2, num_slots, kv_heads, head_dim], contiguous
        sources: int64 [n]; -1 is skipped. Per request increasing, as are the targets, none of which exceeds its source
            in cache order; moves of different requests do not overlap and may be interleaved.
        targets: int64 [n]; -1 is skipped.
    """
    layers, _, num_slots, kv_heads, head_dim = pool.shape
    assert pool.is_contiguous()
    row_elements = kv_heads * head_dim
    grid = (2 * layers, triton.cdiv(row_elements, _BLOCK_ELEMENTS))
    compact_kernel[grid](
        pool, sources, targets, sources.shape[0], num_slots * row_elements, row_elements, row_elements,
        BLOCK_MOVES=_BLOCK_MOVES, BLOCK_ELEMENTS=_BLOCK_ELEMENTS, num_warps=4,
    )  # fmt: skip
