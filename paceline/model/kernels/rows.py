"""Rows of logits as the sampling kernels read them: raw, or an edited fp32 copy of just that row; scaled; as keys.

Keys are int32 in the order of the fp32 logits, so a threshold on keys is exact and can be bisected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

MAX_CHUNKS = 256
"""Programs that one row is split over, at most."""
TILE = 1024
"""Most tokens that a program looks at together: a block of noise (8 tokens) for each of 128 threads."""


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Target logits of one step, on the device.

    Rows whose logits were edited (penalties, masks) have a copy in fp32, as the CPU edits them; the others are read
    where the model wrote them.
    """

    raw: torch.Tensor
    """bf16, fp16 or fp32, last dimension contiguous.  # [rows, vocab]"""
    edited: torch.Tensor | None = None
    """fp32.  # [slots, vocab]"""
    slot: torch.Tensor | None = None
    """int32: which copy stands for the row; -1: none.  # [rows]"""

    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """What every kernel that loads rows takes first: pointers and row strides."""
        edited = self.raw if self.edited is None else self.edited
        slot = self.raw if self.slot is None else self.slot
        return self.raw, self.raw.stride(0), edited, edited.stride(0), slot

    @property
    def has_edits(self) -> bool:
        """Whether any row may have an edited copy."""
        return self.slot is not None


def chunks_of(rows: int, vocab: int) -> tuple[int, int, int]:
    """Programs per row, tiles per program, tokens per tile.

    The shape alone decides, so that a captured graph stays valid.
    """
    tile = min(TILE, max(16, triton.next_power_of_2(vocab)))
    tiles = triton.cdiv(vocab, tile)
    per_program = max(1 if rows < 16 else 4, triton.cdiv(tiles, MAX_CHUNKS))
    return triton.cdiv(tiles, per_program), per_program, tile


@triton.jit
def load_logits(
    raw_ptr: tl.tensor,
    raw_stride: tl.tensor,
    edited_ptr: tl.tensor,
    edited_stride: tl.tensor,
    slot_ptr: tl.tensor,
    row: tl.tensor,
    ids: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    HAS_EDITS: tl.constexpr,
) -> Any:
    """Logits over temperature; NaN becomes +inf, -0 becomes 0, ids beyond the vocabulary -inf.  # fp32, like ids

    The division is rounded as IEEE has it: the CPU's law has exactly these numbers, and ties depend on their last bit.
    """
    inside = ids < vocab
    if HAS_EDITS:
        slot = tl.load(slot_ptr + row).to(tl.int64)
        raw_ptrs = raw_ptr + row.to(tl.int64) * raw_stride + ids
        num_edited = tl.where(slot < 0, 0, vocab)  # of the row's logits: none or all
        x = tl.load(raw_ptrs, mask=ids < vocab - num_edited, other=float("-inf")).to(tl.float32)
        edited = tl.load(edited_ptr + slot * edited_stride + ids, mask=ids < num_edited, other=float("-inf"))
        x = tl.where(slot < 0, x, edited)
    else:
        x = tl.load(raw_ptr + row.to(tl.int64) * raw_stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    x = tl.div_rn(x, tl.zeros_like(x) + scale)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def order_key(x: tl.tensor) -> Any:
    """Integers in the order of the floats.  # fp32 -> int32, same shape"""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_key(key: tl.tensor) -> Any:
    """The float of a key.  # int32 -> fp32, same shape"""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale_of(temperature_ptr: tl.tensor, row: tl.tensor) -> Any:
    """What logits are divided by: 1 for a greedy row.  # fp32, a scalar"""
    temperature = tl.load(temperature_ptr + row)
    return tl.where(temperature == 0.0, 1.0, temperature)
