"""Top-k, top-p and min-p as one threshold per row, found without sorting.

Tokens have one order: by logit descending, ties by id ascending. Top-k keeps its first k; top-p, over what top-k left,
the fewest first ones whose mass reaches p of the total; min-p those not too far below the likeliest. Each keeps a
beginning of that order, so together they are a key and, among the tokens at that key, a last id.

The key is searched on integers in the order of the logits: each pass counts (or weighs, in fp64) the tokens above
several pivots at once, then narrows the range to the keys that occur in it. bf16 logits need three or four passes. A
tile without a key in the range costs a read. Rows without a limit return at once.

Masses are added in another order than on the CPU, and ties are multiplied instead of added up: a top-p set may differ
by a token where the mass hits p to 13 digits, or between logits so close that their weights are the same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from paceline.model.kernels.draw import Cut
from paceline.model.kernels.peaks import Peaks, is_finite, load_peak
from paceline.model.kernels.rows import MAX_CHUNKS, LogitRows, from_order_key, load_logits, order_key

_TILE = 2048
_PIVOTS = 8
_WARPS = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """The options that drop tokens, row by row, on the device."""

    top_k: torch.Tensor
    """int32; 0 is off.  # [rows]"""
    top_p: torch.Tensor
    """fp64; 1 is off.  # [rows]"""
    log_min_p: torch.Tensor
    """fp32 logarithm (taken in fp64) of min-p; -inf is off.  # [rows]"""


@triton.jit
def _load(
    raw: tl.tensor,
    raw_stride: tl.tensor,
    edited: tl.tensor,
    edited_stride: tl.tensor,
    slot: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    vocab: tl.constexpr,
    scale: tl.tensor,
    TILE: tl.constexpr,
    EDITS: tl.constexpr,
) -> Any:
    """Logits over temperature, keys, ids, and which ids are real.  # [TILE] each"""
    ids = start + tl.arange(0, TILE)
    x = load_logits(raw, raw_stride, edited, edited_stride, slot, row, ids, vocab, scale, HAS_EDITS=EDITS)
    return x, order_key(x), ids, ids < vocab


@triton.jit
def _weights(x: tl.tensor, peak: tl.tensor, BY_MASS: tl.constexpr) -> Any:
    """What a token counts: its unnormalised probability, or 1.  # fp64, like x"""
    weight = tl.zeros_like(x).to(tl.float64) + 1.0
    if BY_MASS:
        weight = tl.exp(x.to(tl.float64) - peak.to(tl.float64))
    return weight


@triton.jit
def _weigh_above(
    raw: tl.tensor,
    raw_stride: tl.tensor,
    edited: tl.tensor,
    edited_stride: tl.tensor,
    slot: tl.tensor,
    row: tl.tensor,
    vocab: tl.constexpr,
    scale: tl.tensor,
    peak: tl.tensor,
    least: tl.tensor,
    TILE: tl.constexpr,
    EDITS: tl.constexpr,
) -> Any:
    """Mass of the tokens whose key is at least `least`.  # fp64, a scalar"""
    mass = tl.full((), 0.0, tl.float64)
    for start in range(0, vocab, TILE):
        x, key, _, real = _load(raw, raw_stride, edited, edited_stride, slot, row, start, vocab, scale, TILE, EDITS)
        counted = real & (key >= least)
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            mass += tl.sum(tl.where(counted, _weights(x, peak, True), 0.0), axis=0)
    return mass


@triton.jit
def _search(
    raw: tl.tensor,
    raw_stride: tl.tensor,
    edited: tl.tensor,
    edited_stride: tl.tensor,
    slot: tl.tensor,
    row: tl.tensor,
    vocab: tl.constexpr,
    scale: tl.tensor,
    peak: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    target: tl.tensor,
    BY_MASS: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
    EDITS: tl.constexpr,
) -> Any:
    """The largest key in [low, high] such that the tokens from it upward reach the target; `low` if none does.

    Returns:
        The key (int32), and what the tokens above it come to (fp64).
    """
    above = tl.full((), 0.0, tl.float64)  # of the keys over `high`
    step = tl.arange(0, PIVOTS) + 1
    while low < high:
        span = high.to(tl.int64) - low.to(tl.int64)
        pivots = (low.to(tl.int64) + (span * step + (PIVOTS - 1)) // PIVOTS).to(tl.int32)  # rising, the last is high
        reached = tl.zeros((PIVOTS,), tl.float64)
        least, most = high, low
        for start in range(0, vocab, TILE):
            x, key, _, real = _load(raw, raw_stride, edited, edited_stride, slot, row, start, vocab, scale, TILE, EDITS)
            inside = real & (key >= low) & (key <= high)
            if tl.max(inside.to(tl.int32), axis=0) > 0:
                weight = tl.where(inside, _weights(x, peak, BY_MASS), 0.0)
                reached += tl.sum(tl.where(key[:, None] >= pivots[None, :], weight[:, None], 0.0), axis=0)
                least = tl.minimum(least, tl.min(tl.where(inside, key, 0x7FFFFFFF), axis=0))
                most = tl.maximum(most, tl.max(tl.where(inside, key, -0x7FFFFFFF), axis=0))
        enough = above + reached >= target
        new_low = tl.max(tl.where(enough, pivots, low), axis=0)
        over = tl.min(tl.where(enough, 0x7FFFFFFF, pivots), axis=0)  # the first pivot that is too high
        above = tl.where(
            tl.max((enough == 0).to(tl.int32), axis=0) > 0,
            above + tl.max(tl.where(enough, 0.0, reached), axis=0),
            above,
        )
        high = tl.minimum(tl.minimum(high, over - 1), most)
        low = tl.minimum(tl.maximum(new_low, least), high)
    return low, above


@triton.jit
def _nth_id(
    raw: tl.tensor,
    raw_stride: tl.tensor,
    edited: tl.tensor,
    edited_stride: tl.tensor,
    slot: tl.tensor,
    row: tl.tensor,
    vocab: tl.constexpr,
    scale: tl.tensor,
    wanted: tl.tensor,
    nth: tl.tensor,
    TILE: tl.constexpr,
    EDITS: tl.constexpr,
) -> Any:
    """The nth lowest id among the tokens of one key; a number above all ids if there are fewer.  # int32, a scalar"""
    seen = tl.full((), 0, tl.int32)
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    for start in range(0, vocab, TILE):
        _, key, ids, real = _load(raw, raw_stride, edited, edited_stride, slot, row, start, vocab, scale, TILE, EDITS)
        tied = (real & (key == wanted)).to(tl.int32)
        count = tl.sum(tied, axis=0)
        if (count > 0) & (seen < nth):
            rank = seen + tl.cumsum(tied, axis=0)
            last = tl.minimum(last, tl.min(tl.where((tied > 0) & (rank == nth), ids, 0x7FFFFFFF), axis=0))
        seen += count
    return last


@triton.jit
def _cut_kernel(
    raw_ptr: tl.tensor,
    raw_stride: tl.tensor,
    edited_ptr: tl.tensor,
    edited_stride: tl.tensor,
    slot_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    peak_token_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    log_min_p_ptr: tl.tensor,
    key_ptr: tl.tensor,
    last_ptr: tl.tensor,
    vocab: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
    EDITS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    scale = tl.load(temperature_ptr + row)
    peak, _ = load_peak(peak_ptr, peak_token_ptr, row, CHUNKS)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    log_min_p = tl.load(log_min_p_ptr + row)
    by_count = (top_k > 0) & (top_k < vocab)
    by_mass = top_p < 1.0
    key = tl.full((), -0x7FFFFFFF, tl.int32)
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    if (scale == 0.0) | (is_finite(peak) == 0) | ((log_min_p == float("-inf")) & (by_count == 0) & (by_mass == 0)):
        tl.store(key_ptr + row, key)
        tl.store(last_ptr + row, last)
        return
    highest = order_key(peak)
    nth = tl.full((), 0x7FFFFFFF, tl.int32)  # how many of the tokens at the key are kept
    above = tl.full((), 0.0, tl.float64)
    if by_count:
        lowest = order_key(tl.full((), float("-inf"), tl.float32))
        key, above = _search(
            raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, vocab, scale, peak,
            lowest, highest, top_k.to(tl.float64), False, PIVOTS, TILE, EDITS,
        )  # fmt: skip
        nth = top_k - above.to(tl.int32)
    if by_mass:
        total = _weigh_above(
            raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, vocab, scale, peak,
            tl.where(by_count, key + 1, key), TILE, EDITS,
        )  # fmt: skip
        if by_count:
            total += nth.to(tl.float64) * _weights(from_order_key(key), peak, True)
        # Tokens that weigh less come to less than (1 - p) of the total together: none of them is needed.
        reach = peak + tl.log((1.0 - top_p) * total / vocab).to(tl.float32) - 0.001
        lowest = tl.minimum(tl.maximum(key, order_key(reach + 0.0)), highest)
        target = top_p * total
        found, above = _search(
            raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, vocab, scale, peak,
            lowest, highest, target, True, PIVOTS, TILE, EDITS,
        )  # fmt: skip
        ties = tl.ceil((target - above) / _weights(from_order_key(found), peak, True))
        ties = tl.maximum(tl.minimum(ties, 1e9), 1.0).to(tl.int32)
        nth = tl.where(by_count & (found == key), tl.minimum(nth, ties), ties)
        key = found
    if by_count | by_mass:
        last = _nth_id(
            raw_ptr, raw_stride, edited_ptr, edited_stride, slot_ptr, row, vocab, scale, key, nth, TILE, EDITS
        )
    floor = peak + log_min_p
    least = order_key(tl.where(floor == 0.0, 0.0, floor))
    last = tl.where(least > key, 0x7FFFFFFF, last)
    tl.store(key_ptr + row, tl.maximum(key, least))
    tl.store(last_ptr + row, last)


def find_cut(rows: LogitRows, temperature: torch.Tensor, limits: Limits, peaks: Peaks) -> Cut:
    """What top-k, top-p and min-p leave of every row.

    Args:
        rows: the logits.
        temperature: fp32; 0 is greedy and has no limits.  # [rows]
        limits: the options.
        peaks: `find_peaks` of these rows.
    """
    count, vocab = rows.raw.shape
    key = torch.empty(count, dtype=torch.int32, device=rows.raw.device)
    last = torch.empty_like(key)
    _cut_kernel[(count,)](
        *rows.arguments(),
        temperature,
        peaks.logit,
        peaks.token,
        limits.top_k,
        limits.top_p,
        limits.log_min_p,
        key,
        last,
        vocab,
        CHUNKS=MAX_CHUNKS,
        PIVOTS=_PIVOTS,
        TILE=min(_TILE, max(16, triton.next_power_of_2(vocab))),
        EDITS=rows.has_edits,
        num_warps=_WARPS,
        enable_fp_fusion=False,  # p times the total is rounded before it is compared, as on the CPU
    )
    return Cut(key, last)


def kept_tokens(logits: torch.Tensor, temperature: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Which tokens a cut leaves, in plain tensor operations.  # logits fp32 [rows, vocab] -> bool [rows, vocab]"""
    scaled = logits / torch.where(temperature == 0, 1.0, temperature)[:, None] + 0.0
    bits = scaled.view(torch.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], device=logits.device)
    at = (key == cut.key[:, None]) & (ids <= cut.last[:, None])
    return (key > cut.key[:, None]) | at
