"""Probabilities of a row as the rules that weigh draft laws need them: a token's weight over the row's mass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from paceline.model.kernels.draw import Cut
from paceline.model.kernels.peaks import Peaks, is_finite, load_peak
from paceline.model.kernels.rows import MAX_CHUNKS, LogitRows, chunks_of, load_logits, order_key, scale_of


@triton.jit
def token_weights(
    x: tl.tensor,
    ids: tl.tensor,
    vocab: tl.tensor,
    peak: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    cut_key: tl.tensor,
    cut_last: tl.tensor,
) -> Any:
    """Unnormalised probabilities as `Law.weights` has them: below e^-660 there are none.  # fp64, like x"""
    key = order_key(x)
    kept = (ids < vocab) & ((key > cut_key) | ((key == cut_key) & (ids <= cut_last)))
    kept = tl.where(temperature == 0.0, ids == best, kept)
    below = x.to(tl.float64) - peak.to(tl.float64)
    kept = kept & (below >= -660.0)
    return tl.where(kept, tl.exp(tl.where(kept, below, 0.0)), 0.0)


@triton.jit
def load_cut(cut_key_ptr: tl.tensor, cut_last_ptr: tl.tensor, row: tl.tensor, HAS_CUT: tl.constexpr) -> Any:
    """The row's cut; without one, a key below all.  # two int32 scalars"""
    key = tl.full((), -0x7FFFFFFF, tl.int32)
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    if HAS_CUT:
        key = tl.load(cut_key_ptr + row)
        last = tl.load(cut_last_ptr + row)
    return key, last


@triton.jit
def _mass_kernel(
    raw_ptr: tl.tensor,
    raw_stride: tl.tensor,
    edited_ptr: tl.tensor,
    edited_stride: tl.tensor,
    slot_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    peak_token_ptr: tl.tensor,
    cut_key_ptr: tl.tensor,
    cut_last_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    vocab: tl.tensor,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_EDITS: tl.constexpr,
    HAS_CUT: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    peak, best = load_peak(peak_ptr, peak_token_ptr, row, CHUNKS)
    cut_key, cut_last = load_cut(cut_key_ptr, cut_last_ptr, row, HAS_CUT)
    temperature = tl.load(temperature_ptr + row)
    scale = scale_of(temperature_ptr, row)
    mass = tl.full((), 0.0, tl.float64)
    if is_finite(peak):
        for i in range(TILES):
            ids = (chunk * TILES + i) * TILE + tl.arange(0, TILE)
            x = load_logits(raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, ids, vocab, scale, HAS_EDITS)
            mass += tl.sum(token_weights(x, ids, vocab, peak, best, temperature, cut_key, cut_last), axis=0)
    tl.store(mass_ptr + row * CHUNKS + chunk, mass)


def find_masses(rows: LogitRows, temperature: torch.Tensor, peaks: Peaks, cut: Cut | None = None) -> torch.Tensor:
    """What the weights of every row come to, by parts of the vocabulary.  # fp64 [rows, MAX_CHUNKS]

    Args:
        rows: the logits.
        temperature: fp32; a greedy row's law is its likeliest token.  # [rows]
        peaks: `find_peaks` of these rows.
        cut: what `find_cut` left; None: everything.
    """
    count, vocab = rows.raw.shape
    chunks, tiles, tile = chunks_of(count, vocab)
    mass = torch.zeros((count, MAX_CHUNKS), dtype=torch.float64, device=rows.raw.device)
    bounds = (temperature, temperature) if cut is None else (cut.key, cut.last)
    _mass_kernel[(count, chunks)](
        *rows.arguments(),
        temperature,
        peaks.logit,
        peaks.token,
        *bounds,
        mass,
        vocab,
        TILES=tiles,
        TILE=tile,
        CHUNKS=MAX_CHUNKS,
        HAS_EDITS=rows.has_edits,
        HAS_CUT=cut is not None,
    )
    return mass
