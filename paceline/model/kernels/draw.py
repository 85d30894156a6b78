"""The target's own sample of many rows: `Law.draw` of the CPU, split over the vocabulary.

Two passes and a small reduction. The first finds the likeliest token; its finish in the exponential race (E / w with
E = -log u, w = exp(logit - peak)) bounds who can still win. The second makes noise tile by tile: a tile without a
kept token that could beat the bound gets none, so rows cut to few tokens cost a read. Within a tile noise is made for
all: Philox costs some 50 integer instructions a token, less than sorting out who needs it. An fp32 test that errs on
the safe side leaves a handful for the fp64 comparison, which uses the CPU's formula, ties to the lowest id.

The words are the CPU's integers. fp64 `log` and `exp` of the device may differ from NumPy's in the last bit, so the
winner may differ where two finishes agree to 15 digits (about 1e-15 a draw).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from paceline.engine.rng import Stream
from paceline.model.kernels.noise import noise_tile, noise_word, uniform
from paceline.model.kernels.peaks import Peaks, find_peaks, is_finite, load_peak
from paceline.model.kernels.rows import MAX_CHUNKS, LogitRows, chunks_of, load_logits, order_key


@dataclass(frozen=True, slots=True)
class Places:
    """Where each row's noise stands; all int64 on the device."""

    seed: torch.Tensor
    """64 bits, read as unsigned.  # [rows]"""
    sample_index: torch.Tensor  # [rows]
    position: torch.Tensor
    """Absolute position of the token drawn.  # [rows]"""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which tokens top-k, top-p and min-p left: those above a key, and of those at it the ones up to an id."""

    key: torch.Tensor
    """int32, of the logit over temperature.  # [rows]"""
    last: torch.Tensor
    """int32, the highest token id kept at that key.  # [rows]"""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token a row."""

    token: torch.Tensor
    """int32; 0 where the row has no law.  # [rows]"""
    finite: torch.Tensor
    """bool: whether the row's largest logit was finite (NaN counts as largest).  # [rows]"""


@triton.jit
def tile_race(
    x: tl.tensor,
    kept: tl.tensor,
    ids: tl.tensor,
    start: tl.tensor,
    peak: tl.tensor,
    bound: tl.tensor,
    position: tl.tensor,
    stream: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    TILE: tl.constexpr,
) -> Any:
    """The first of the tile's kept tokens to finish, if it may beat the bound.

    Returns:
        Its finish (fp64; +inf if there is none) and its id (int32).
    """
    finish = tl.full((), float("inf"), tl.float64)
    winner = tl.full((), 0x7FFFFFFF, tl.int32)
    words = noise_tile(start, position, stream, tl.full((), 0, tl.uint64), key0, key1, TILE)
    # E >= 1 - u, so who has more of that than its weight times the bound (an fp32 with room for rounding) is later.
    left = ((words ^ tl.full((), 0xFFFFFFFF, tl.uint32)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    near = kept & (left <= tl.exp(x - peak) * bound)
    if tl.max(near.to(tl.int32), axis=0) > 0:
        weight = tl.exp(tl.where(near, x, peak).to(tl.float64) - peak.to(tl.float64))
        times = tl.where(near, -tl.log(uniform(words)) / weight, float("inf"))
        finish = tl.min(times, axis=0)
        winner = tl.min(tl.where(near & (times == finish), ids, 0x7FFFFFFF), axis=0)
    return finish, winner


@triton.jit
def _race_kernel(
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
    seed_ptr: tl.tensor,
    sample_ptr: tl.tensor,
    position_ptr: tl.tensor,
    finish_ptr: tl.tensor,
    winner_ptr: tl.tensor,
    vocab: tl.tensor,
    STREAM: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_EDITS: tl.constexpr,
    HAS_CUT: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    out = row * CHUNKS + chunk
    peak, best = load_peak(peak_ptr, peak_token_ptr, row, CHUNKS)
    temperature = tl.load(temperature_ptr + row)
    if (temperature == 0.0) | (is_finite(peak) == 0):
        tl.store(finish_ptr + out, tl.full((), 0.0, tl.float64))
        tl.store(winner_ptr + out, best)
        return
    key0 = tl.load(seed_ptr + row).to(tl.uint64, bitcast=True)
    key1 = tl.load(sample_ptr + row).to(tl.uint64, bitcast=True)
    position = tl.load(position_ptr + row).to(tl.uint64, bitcast=True)
    channel = tl.full((), STREAM, tl.uint64)
    first = -tl.log(uniform(noise_word(best, position, channel, tl.full((), 0, tl.uint64), key0, key1)))
    bound = (first * 1.0001).to(tl.float32)
    # No finish is earlier than 2^-33 over the weight (33 log 2 = 22.87); 0.01 is room for fp32.
    lowest = peak - tl.log(bound) - 22.884
    if HAS_CUT:
        cut_key = tl.load(cut_key_ptr + row)
        cut_last = tl.load(cut_last_ptr + row)
    finish = tl.full((), float("inf"), tl.float64)
    winner = tl.full((), 0x7FFFFFFF, tl.int32)
    for i in range(TILES):
        start = (chunk * TILES + i) * TILE
        ids = start + tl.arange(0, TILE)
        x = load_logits(
            raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, ids, vocab, temperature, HAS_EDITS=HAS_EDITS
        )
        kept = (x >= lowest) & (ids < vocab)
        if HAS_CUT:
            key = order_key(x)
            kept = kept & ((key > cut_key) | ((key == cut_key) & (ids <= cut_last)))
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            earliest, token = tile_race(x, kept, ids, start, peak, bound, position, channel, key0, key1, TILE)
            winner = tl.where(earliest < finish, token, winner)  # tiles go up, so a tie keeps the lower id
            finish = tl.minimum(earliest, finish)
    tl.store(finish_ptr + out, finish)
    tl.store(winner_ptr + out, winner)


@triton.jit(do_not_specialize=["chunks"])
def _winner_kernel(
    finish_ptr: tl.tensor,
    winner_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    token_ptr: tl.tensor,
    finite_ptr: tl.tensor,
    chunks: tl.tensor,
    CHUNKS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    times = tl.load(finish_ptr + row * CHUNKS + chunk, mask=chunk < chunks, other=float("inf"))
    tokens = tl.load(winner_ptr + row * CHUNKS + chunk, mask=chunk < chunks, other=0x7FFFFFFF)
    token = tl.min(tl.where(times == tl.min(times, axis=0), tokens, 0x7FFFFFFF), axis=0)
    finite = is_finite(tl.max(tl.load(peak_ptr + row * CHUNKS + chunk), axis=0))
    tl.store(token_ptr + row, tl.where(finite, token, 0))
    tl.store(finite_ptr + row, finite.to(tl.int8))


def draw_rows(
    rows: LogitRows,
    places: Places,
    temperature: torch.Tensor,
    cut: Cut | None = None,
    peaks: Peaks | None = None,
    stream: Stream = Stream.TARGET,
) -> Drawn:
    """Draw one token for every row.

    Args:
        rows: the logits.
        places: each row's noise.
        temperature: fp32; 0 is greedy, what is positive must be at least 1e-30.  # [rows]
        cut: what `limits.find_cut` left; None: everything.
        peaks: `find_peaks` of these rows, if it ran before.
        stream: which of the noise streams is read.
    """
    count, vocab = rows.raw.shape
    device = rows.raw.device
    chunks, tiles, tile = chunks_of(count, vocab)
    peaks = find_peaks(rows, temperature) if peaks is None else peaks
    finish = torch.empty((count, MAX_CHUNKS), dtype=torch.float64, device=device)
    winner = torch.empty((count, MAX_CHUNKS), dtype=torch.int32, device=device)
    _race_kernel[(count, chunks)](
        *rows.arguments(),
        temperature,
        peaks.logit,
        peaks.token,
        temperature if cut is None else cut.key,
        temperature if cut is None else cut.last,
        places.seed,
        places.sample_index,
        places.position,
        finish,
        winner,
        vocab,
        STREAM=int(stream),
        TILES=tiles,
        TILE=tile,
        CHUNKS=MAX_CHUNKS,
        HAS_EDITS=rows.has_edits,
        HAS_CUT=cut is not None,
    )
    token = torch.empty(count, dtype=torch.int32, device=device)
    finite = torch.empty(count, dtype=torch.int8, device=device)
    _winner_kernel[(count,)](finish, winner, peaks.logit, token, finite, chunks, CHUNKS=MAX_CHUNKS)
    return Drawn(token, finite.view(torch.bool))
