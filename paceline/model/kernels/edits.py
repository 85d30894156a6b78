"""Logit edits in the order of `sampling.edit_logits`, on fp32 copies of just the rows that have any.

Penalties and bias touch few tokens and come as a flat list of (slot, token) entries, each token of a slot once. The
grammar's mask is applied while the row is copied: no finite edit brings a masked token back, so the order is the same.
`min_tokens` comes last, since beside a grammar it applies only where something else than an end is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from paceline.config import SamplingParams
from paceline.model.kernels.rows import TILE, LogitRows

_ENTRIES = 256


@dataclass(frozen=True, slots=True)
class Entries:
    """Edits of single tokens: `x = (x > 0 ? x / factor : x * factor) - minus + plus`."""

    slot: torch.Tensor  # int32 [entries]
    token: torch.Tensor  # int32 [entries]
    factor: torch.Tensor  # fp32 [entries]
    minus: torch.Tensor  # fp32 [entries]
    plus: torch.Tensor  # fp32 [entries]


@dataclass(frozen=True, slots=True)
class Masks:
    """What may not be said, slot by slot; int32 on the device."""

    bits: torch.Tensor
    """Grammar masks: bit t % 32 of word t // 32 allows token t.  # [masks, ceil(vocab / 32)]"""
    mask: torch.Tensor
    """Which grammar mask; -1: none.  # [slots]"""
    ends: torch.Tensor
    """Tokens that `min_tokens` masks, each once a slot; -1 fills up.  # [slots, max_ends]"""


@dataclass(frozen=True, slots=True)
class Edited:
    """The result."""

    rows: LogitRows
    possible: torch.Tensor
    """bool: whether the grammar (or the logits) left any token of the slot.  # [slots]"""


def entries_of(params: SamplingParams, prompt: Sequence[int], output: Sequence[int], vocab: int) -> np.ndarray:
    """A request's edits of single tokens; columns are token, factor, minus, plus.  # fp64 [touched, 4]"""
    columns = {"factor": np.ones(vocab), "minus": np.zeros(vocab), "plus": np.zeros(vocab)}
    if params.repetition_penalty != 1.0:
        columns["factor"][np.asarray([*prompt, *output], dtype=np.int64)] = params.repetition_penalty
    if output and (params.presence_penalty or params.frequency_penalty):
        seen, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        columns["minus"][seen] = params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        columns["plus"][token] = bias
    factor, minus, plus = columns.values()
    touched = np.flatnonzero((factor != 1.0) | (minus != 0.0) | (plus != 0.0))
    return np.stack([touched, factor[touched], minus[touched], plus[touched]], axis=1)


def entries_on(parts: Sequence[np.ndarray], device: torch.device) -> Entries:
    """`entries_of` of every slot, in order, on the device."""
    slot = np.repeat(np.arange(len(parts)), [len(part) for part in parts]).astype(np.int32)
    flat = np.concatenate([*parts, np.empty((0, 4))])
    token, numbers = flat[:, 0].astype(np.int32), flat[:, 1:].astype(np.float32)
    columns = [slot, token, *(np.ascontiguousarray(numbers[:, i]) for i in range(3))]
    return Entries(*(torch.from_numpy(column).to(device) for column in columns))


@triton.jit
def _copy_kernel(
    raw_ptr: tl.tensor,
    raw_stride: tl.tensor,
    row_ptr: tl.tensor,
    out_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    bits_stride: tl.tensor,
    mask_ptr: tl.tensor,
    alive_ptr: tl.tensor,
    vocab: tl.tensor,
    chunks: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    slot = tl.program_id(0)
    chunk = tl.program_id(1)
    ids = chunk * TILE + tl.arange(0, TILE)
    inside = ids < vocab
    row = tl.load(row_ptr + slot).to(tl.int64)
    x = tl.load(raw_ptr + row * raw_stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
    mask = tl.load(mask_ptr + slot)
    if mask >= 0:
        word = tl.load(bits_ptr + mask.to(tl.int64) * bits_stride + ids // 32, mask=inside, other=0)
        x = tl.where(((word >> (ids % 32)) & 1) != 0, x, float("-inf"))
    tl.store(out_ptr + slot.to(tl.int64) * vocab + ids, x, mask=inside)
    tl.store(alive_ptr + slot * chunks + chunk, tl.sum((x != float("-inf")).to(tl.int32), axis=0))


@triton.jit
def _entries_kernel(
    out_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    token_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    minus_ptr: tl.tensor,
    plus_ptr: tl.tensor,
    count: tl.tensor,
    vocab: tl.tensor,
    ENTRIES: tl.constexpr,
) -> None:
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    exists = entry < count
    slot = tl.load(slot_ptr + entry, mask=exists, other=0).to(tl.int64)
    at = out_ptr + slot * vocab + tl.load(token_ptr + entry, mask=exists, other=0)
    factor = tl.load(factor_ptr + entry, mask=exists, other=1.0)
    x = tl.load(at, mask=exists, other=0.0)
    x = tl.where(x > 0.0, tl.div_rn(x, factor), x * factor)
    x = x - tl.load(minus_ptr + entry, mask=exists, other=0.0)
    x = x + tl.load(plus_ptr + entry, mask=exists, other=0.0)
    tl.store(at, x, mask=exists)


@triton.jit
def _ends_kernel(
    out_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    alive_ptr: tl.tensor,
    possible_ptr: tl.tensor,
    vocab: tl.tensor,
    chunks: tl.tensor,
    max_ends: tl.tensor,
    ENDS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    slot = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    alive = tl.sum(tl.load(alive_ptr + slot * chunks + chunk, mask=chunk < chunks, other=0), axis=0)
    i = tl.arange(0, ENDS)
    end = tl.load(ends_ptr + slot * max_ends + i, mask=i < max_ends, other=-1)
    exists = end >= 0
    at = out_ptr + slot.to(tl.int64) * vocab + end
    x = tl.load(at, mask=exists, other=float("-inf"))
    others = alive - tl.sum((x != float("-inf")).to(tl.int32), axis=0)
    # Where a grammar allows only an end, the text ends, however short it is.
    applies = (tl.load(mask_ptr + slot) < 0) | (others > 0)
    tl.store(at, tl.zeros_like(x) - float("inf"), mask=tl.where(applies, end, -1) >= 0)
    tl.store(possible_ptr + slot, (alive > 0).to(tl.int8))


def edit_rows(raw: torch.Tensor, row: torch.Tensor, entries: Entries, masks: Masks) -> Edited:
    """Copy rows to fp32 and edit the copies.

    Args:
        raw: the target's logits.  # [rows, vocab]
        row: int32, the row that each slot is a copy of.  # [slots]
        entries: penalties and bias.
        masks: grammar and `min_tokens`.
    """
    slots, vocab = len(row), raw.shape[1]
    chunks = triton.cdiv(vocab, TILE)
    out = torch.empty((slots, vocab), dtype=torch.float32, device=raw.device)
    alive = torch.empty((slots, chunks), dtype=torch.int32, device=raw.device)
    possible = torch.empty(slots, dtype=torch.int8, device=raw.device)
    _copy_kernel[(slots, chunks)](
        raw, raw.stride(0), row, out, masks.bits, masks.bits.stride(0), masks.mask, alive, vocab, chunks, TILE=TILE
    )
    count = len(entries.slot)
    if count:
        columns = (entries.slot, entries.token, entries.factor, entries.minus, entries.plus)
        # Each operation is rounded as on the CPU: a fused multiply-add would round once.
        grid = (triton.cdiv(count, _ENTRIES),)
        _entries_kernel[grid](out, *columns, count, vocab, ENTRIES=_ENTRIES, enable_fp_fusion=False)
    max_ends = masks.ends.shape[1]
    _ends_kernel[(slots,)](
        out,
        masks.ends,
        masks.mask,
        alive,
        possible,
        vocab,
        chunks,
        max_ends,
        ENDS=triton.next_power_of_2(max(max_ends, 1)),
        CHUNKS=triton.next_power_of_2(chunks),
    )
    slot_of_row = torch.full((raw.shape[0],), -1, dtype=torch.int32, device=raw.device)
    slot_of_row[row.long()] = torch.arange(slots, dtype=torch.int32, device=raw.device)
    return Edited(LogitRows(raw, out, slot_of_row), possible.view(torch.bool))
