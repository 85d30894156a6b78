"""All layers of a Llama-like decoder, and its head, in one native call for each thread."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit

from paceline.compiled import address_of
from paceline.model.native.attention import COMMON, FIRST, WAVE, arrange, score_part, value_part, weigh_part
from paceline.model.native.matmul import CALL, block_sums, multiply_part, round_row
from paceline.model.native.packed import WORDS, array1, array2, array4, array5, number
from paceline.model.native.rows import gate, rms_norm, rotate
from paceline.model.native.team import PART, meet
from paceline.model.native.tiles import BLOCK

QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN = range(7)
"""Matrices of a layer, in the order of the table of weights."""
MATRICES = 7
ALONE, FIRST_OF_GROUP, LATER_OF_GROUP = range(3)
"""How a layer enters (`model/path.py`)."""


def part(thread: int, threads: int, place: int, words: Any) -> None:
    """`forward` as a team runs it; `words` are its other arguments, packed."""
    words = carray(words, (WORDS * ARGUMENTS,), np.int64)
    forward(
        thread,
        threads,
        place,
        array2(words, 0, np.int64),
        array2(words, 1, np.float32),
        array2(words, 2, np.float32),
        array2(words, 3, np.float32),
        array2(words, 4, np.float32),
        array2(words, 5, np.float32),
        number(words, 6),
        number(words, 7),
        array5(words, 8, np.float32),
        array1(words, 9, np.int64),
        array1(words, 10, np.int64),
        array1(words, 11, np.int64),
        array1(words, 12, np.bool_),
        array1(words, 13, np.int64),
        array1(words, 14, np.int64),
        array1(words, 15, np.int64),
        array1(words, 16, np.int64),
        array2(words, 17, np.float32),
        array2(words, 18, np.float32),
        array1(words, 19, np.float32),
        array2(words, 20, np.int8),
        array1(words, 21, np.float32),
        array2(words, 22, np.float32),
        array2(words, 23, np.float32),
        array4(words, 24, np.float32),
        array2(words, 25, np.int64),
        array1(words, 26, np.int64),
        array2(words, 27, np.int64),
        array2(words, 28, np.float32),
        array2(words, 29, np.float32),
        array2(words, 30, np.int64),
        array2(words, 31, np.float32),
    )


ARGUMENTS = 32
"""Of `forward` beside the first three."""


@cache
def forward_address() -> int:
    """The address of `part` for a team; compiled when first asked for."""
    return address_of(part, PART)


@njit(nogil=True, error_model="numpy")
def forward(
    thread: int,
    threads: int,
    place: int,
    weights: np.ndarray,
    norms: np.ndarray,
    head_norms: np.ndarray,
    biases: np.ndarray,
    cosines: np.ndarray,
    sines: np.ndarray,
    epsilon: float,
    scale: float,
    kv: np.ndarray,
    slots: np.ndarray,
    positions: np.ndarray,
    seen: np.ndarray,
    visible: np.ndarray,
    visible_at: np.ndarray,
    keys: np.ndarray,
    keys_at: np.ndarray,
    wanted: np.ndarray,
    h: np.ndarray,
    x: np.ndarray,
    sums: np.ndarray,
    rounded: np.ndarray,
    scales: np.ndarray,
    qkv: np.ndarray,
    both: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    counts: np.ndarray,
    tails: np.ndarray,
    hidden: np.ndarray,
    logits: np.ndarray,
    path: np.ndarray,
    entry: np.ndarray,
) -> None:
    """Run one thread's part.

    Args:
        thread: which.
        threads: of how many.
        place: address of their barrier's counter.
        weights: see `matmul.WEIGHT`; seven a layer, then the head's.  # [7 * L + 1, WEIGHT]
        norms: before attention and MLP of each layer, then the last.  # [2 * L + 1, D]
        head_norms: of query and key heads, or none.  # [2 * L or 0, d]
        biases: of query, key and value, or none.  # [L or 0, Q]
        cosines: of the rotary embedding by position.  # [P, d / 2]
        sines: likewise.
        epsilon: of all norms.
        scale: of attention scores.
        kv: the pool.  # [L, 2, slots, kv_heads, d]
        slots: where rows go.  # [M]
        positions: of rows.  # [M]
        seen: keys from a sequence's first that a row sees without exception.  # [M]
        visible: which of those behind them each row sees, row after row.
        visible_at: where a row's begin; one more than rows.  # [M + 1]
        keys: where each sequence's keys lie, in bytes behind the first slot's.
        keys_at: where those of a row's sequence begin.  # [M]
        wanted: rows whose logits are wanted.  # [R]
        h: embeddings; overwritten.  # [M, D]
        x: scratch.  # [M, widest input]
        sums: scratch, if a product takes fp32 rows.  # [M * widest input / 32 or 0]
        rounded: scratch, if one takes rows in 8 bits.  # int8 [M or 0, widest input]
        scales: likewise.  # [M * widest input / 32 * 2 or 0]
        qkv: scratch.  # [M, Q]
        both: scratch.  # [M, 2 * I]
        scores: scratch.  # [WAVE, KV heads, query heads of each, longest context rounded up]
        groups: scratch.  # int64 [M + 1, 2]
        counts: scratch.  # int64 [M]
        tails: scratch.  # int64 [M, what a row may see beside its group's common keys, rounded up]
        hidden: last hidden states of the wanted rows.  # [R, D]
        logits: their logits.  # [R, V, filled up to a multiple of 16]
        path: the layers that run, and how each enters: `ALONE`, `FIRST_OF_GROUP` or `LATER_OF_GROUP`.  # [P, 2]
        entry: scratch, the state at which a group enters, if there are groups.  # [M or 0, D]
    """
    rows, width = h.shape
    layers, kv_heads, size = kv.shape[0], kv.shape[3], kv.shape[4]
    key_at, inner = qkv.shape[1] - 2 * kv_heads * size, both.shape[1] // 2
    value_at = key_at + kv_heads * size
    met, call = 0, np.empty(CALL, np.int64)
    if thread == 0:
        arrange(seen, visible, visible_at, keys, keys_at, groups, counts, tails)
    for at in range(len(path)):
        layer, enters = path[at, 0], path[at, 1]
        matrices = weights[MATRICES * layer : MATRICES * (layer + 1)]
        for r in range(thread, rows, threads):
            if enters == FIRST_OF_GROUP:
                entry[r] = h[r]
            source = entry[r] if enters == LATER_OF_GROUP else h[r]
            _normed(source, norms[2 * layer], epsilon, x[r], sums, rounded, scales, r)
        met = meet(place, threads, met)
        multiply_part(matrices[QUERY], x, sums, rounded, scales, qkv, 0, False, thread, threads, call)
        multiply_part(matrices[KEY], x, sums, rounded, scales, qkv, key_at, False, thread, threads, call)
        multiply_part(matrices[VALUE], x, sums, rounded, scales, qkv, value_at, False, thread, threads, call)
        met = meet(place, threads, met)
        for r in range(thread, rows, threads):
            if len(biases):
                for i in range(qkv.shape[1]):
                    qkv[r, i] += biases[layer, i]
            for start in range(0, value_at, size):
                one = qkv[r, start : start + size]
                if len(head_norms):
                    rms_norm(one, head_norms[2 * layer + (start >= key_at)], epsilon, one)
                rotate(one, cosines[positions[r]], sines[positions[r]])
            kv[layer, 0, slots[r]] = qkv[r, key_at:value_at].reshape(kv_heads, size)
            kv[layer, 1, slots[r]] = qkv[r, value_at:].reshape(kv_heads, size)
        met = meet(place, threads, met)
        k, v = kv[layer, 0].ctypes.data, kv[layer, 1].ctypes.data
        group = 0
        for wave in range(0, rows, WAVE):
            end, after = min(wave + WAVE, rows), group
            while groups[after, FIRST] < end:
                first, last, common = groups[after, FIRST], groups[after + 1, FIRST], groups[after, COMMON]
                own = keys[keys_at[first] :]
                score_part(first, last, common, qkv, size, k, own, counts, tails, scores, thread, threads)
                after += 1
            met = meet(place, threads, met)
            weigh_part(wave, end, counts, scores, scale, thread, threads)
            met = meet(place, threads, met)
            for g in range(group, after):
                first, last, common = groups[g, FIRST], groups[g + 1, FIRST], groups[g, COMMON]
                own = keys[keys_at[first] :]
                value_part(first, last, common, scores, size, v, own, counts, tails, x, thread, threads)
            group = after
            met = meet(place, threads, met)
        for r in range(thread, rows, threads):
            _known(x[r], key_at, sums, rounded, scales, r)
        met = meet(place, threads, met)
        multiply_part(matrices[OUTPUT], x, sums, rounded, scales, h, 0, True, thread, threads, call)
        met = meet(place, threads, met)
        for r in range(thread, rows, threads):
            _normed(h[r], norms[2 * layer + 1], epsilon, x[r], sums, rounded, scales, r)
        met = meet(place, threads, met)
        multiply_part(matrices[GATE], x, sums, rounded, scales, both, 0, False, thread, threads, call)
        multiply_part(matrices[UP], x, sums, rounded, scales, both, inner, False, thread, threads, call)
        met = meet(place, threads, met)
        for r in range(thread, rows, threads):
            gate(both[r], x[r, :inner])
            _known(x[r], inner, sums, rounded, scales, r)
        met = meet(place, threads, met)
        multiply_part(matrices[DOWN], x, sums, rounded, scales, h, 0, True, thread, threads, call)
        met = meet(place, threads, met)
    for i in range(thread, len(wanted), threads):
        rms_norm(h[wanted[i]], norms[2 * layers], epsilon, hidden[i])
        _known(hidden[i], width, sums, rounded, scales, i)
    met = meet(place, threads, met)
    multiply_part(weights[MATRICES * layers], hidden, sums, rounded, scales, logits, 0, False, thread, threads, call)


@njit(nogil=True, error_model="numpy")
def _normed(
    h: np.ndarray,
    weight: np.ndarray,
    epsilon: float,
    x: np.ndarray,
    sums: np.ndarray,
    rounded: np.ndarray,
    scales: np.ndarray,
    row: int,
) -> None:
    rms_norm(h, weight, epsilon, x[: h.shape[0]])
    _known(x, h.shape[0], sums, rounded, scales, row)


@njit(nogil=True, error_model="numpy")
def _known(x: np.ndarray, width: int, sums: np.ndarray, rounded: np.ndarray, scales: np.ndarray, row: int) -> None:
    """What products need to know of a row beside its values."""
    blocks = width // BLOCK
    if sums.shape[0]:
        block_sums(x[:width], sums[row * blocks : (row + 1) * blocks])
    if rounded.shape[0]:
        round_row(x[:width], rounded[row, :width], scales[2 * row * blocks : 2 * (row + 1) * blocks])
