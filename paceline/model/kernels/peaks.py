"""The likeliest token of every row: the first pass of a draw, and all of a greedy one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from paceline.model.kernels.rows import MAX_CHUNKS, LogitRows, chunks_of, load_logits, scale_of


@dataclass(frozen=True, slots=True)
class Peaks:
    """Likeliest tokens by parts of the vocabulary, over temperature; ties go to the lowest id."""

    logit: torch.Tensor
    """fp32; entries past the last chunk are -inf.  # [rows, MAX_CHUNKS]"""
    token: torch.Tensor
    """int32.  # [rows, MAX_CHUNKS]"""


@triton.jit
def _peaks_kernel(
    raw_ptr: tl.tensor,
    raw_stride: tl.tensor,
    edited_ptr: tl.tensor,
    edited_stride: tl.tensor,
    slot_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    logit_ptr: tl.tensor,
    token_ptr: tl.tensor,
    vocab: tl.tensor,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_EDITS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    scale = scale_of(temperature_ptr, row)
    peak = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    for i in range(TILES):
        ids = (chunk * TILES + i) * TILE + tl.arange(0, TILE)
        x = load_logits(
            raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, ids, vocab, scale, HAS_EDITS=HAS_EDITS
        )
        top = tl.max(x, axis=0)
        first = tl.min(tl.where(x == top, ids, 0x7FFFFFFF), axis=0)
        token = tl.where(top > peak, first, token)
        peak = tl.maximum(top, peak)
    tl.store(logit_ptr + row * CHUNKS + chunk, peak)
    tl.store(token_ptr + row * CHUNKS + chunk, token)


@triton.jit
def load_peak(logit_ptr: tl.tensor, token_ptr: tl.tensor, row: tl.tensor, CHUNKS: tl.constexpr) -> Any:
    """The row's largest logit over temperature and the lowest token that has it.  # fp32 and int32 scalars"""
    chunk = tl.arange(0, CHUNKS)
    logits = tl.load(logit_ptr + row * CHUNKS + chunk)
    tokens = tl.load(token_ptr + row * CHUNKS + chunk)
    peak = tl.max(logits, axis=0)
    return peak, tl.min(tl.where(logits == peak, tokens, 0x7FFFFFFF), axis=0)


@triton.jit
def is_finite(peak: tl.tensor) -> Any:
    """Whether the row has a law: a NaN counts as +inf, so one value tells.  # a scalar"""
    return (peak > float("-inf")) & (peak < float("inf"))


def find_peaks(rows: LogitRows, temperature: torch.Tensor) -> Peaks:
    """Peaks of all rows, the vocabulary split over programs so that one row uses many processors.

    Args:
        rows: the logits.
        temperature: fp32; 0 is greedy, what is positive must be at least 1e-30.  # [rows]
    """
    count, vocab = rows.raw.shape
    chunks, tiles, tile = chunks_of(count, vocab)
    logit = torch.full((count, MAX_CHUNKS), float("-inf"), dtype=torch.float32, device=rows.raw.device)
    token = torch.zeros((count, MAX_CHUNKS), dtype=torch.int32, device=rows.raw.device)
    _peaks_kernel[(count, chunks)](
        *rows.arguments(),
        temperature,
        logit,
        token,
        vocab,
        TILES=tiles,
        TILE=tile,
        CHUNKS=MAX_CHUNKS,
        HAS_EDITS=rows.has_edits,
    )
    return Peaks(logit, token)
