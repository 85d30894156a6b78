"""Attention of a few query tokens over paged keys and values, by all threads together.

Rows of a sequence go over the keys that all of them see at the same time, a chunk that fits the first cache after the
other; behind these, every row has a list of its own of what else it sees (its path in a draft tree, say), which leaves
no gap. The threads share keys while scores are made, query heads in the softmax, and parts of heads while values are
summed, so that even one row keeps all of them busy. A row's operations and their order are the same in any company.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from paceline.model.native.attention_kernels import (
    TOGETHER,
    WIDE,
    fetched,
    scores_of_four,
    scores_of_one,
    sums_of_four,
    sums_of_one,
    sums_of_two,
)
from paceline.model.native.rows import exponential
from paceline.model.native.vectors import LANES

GROUP = 8
"""Most rows that go over the same keys together."""
WAVE = 2 * GROUP
"""Most rows whose scores are kept at a time."""
FIRST, COMMON = range(2)
"""Of a group: its first row, and how many keys all of its rows see, in whole `TOGETHER`s."""
_CHUNK = 64
"""Keys that all queries go over before the next ones (16 KB of a head of 64)."""
_LINE = 64


@njit(nogil=True, error_model="numpy")
def arrange(
    seen: np.ndarray,
    visible: np.ndarray,
    visible_at: np.ndarray,
    keys: np.ndarray,
    keys_at: np.ndarray,
    groups: np.ndarray,
    counts: np.ndarray,
    tails: np.ndarray,
) -> None:
    """Put rows in groups, and list what each of them sees beside the keys that its group has in common.

    Args:
        seen: keys from a sequence's first that a row sees without exception.  # [M]
        visible: of those behind them, row after row, whether it sees them.  # bool
        visible_at: where a row's begin; one more than rows.  # [M + 1]
        keys: where each sequence's keys lie, in bytes.
        keys_at: where those of a row's sequence begin.  # [M]
        groups: result: `FIRST` and `COMMON` of each group; behind the last one, `FIRST` is M.  # [M + 1, 2]
        counts: result: keys that a row sees.  # [M]
        tails: result: the places of those that are not common, and so many more that whole `TOGETHER`s can be read.
    """
    rows, number, first = len(seen), 0, 0
    while first < rows:
        last, common = first + 1, seen[first]
        while last < rows and last % GROUP and keys_at[last] == keys_at[first]:
            common = min(common, seen[last])
            last += 1
        groups[number, FIRST], groups[number, COMMON] = first, common // TOGETHER * TOGETHER
        for r in range(first, last):
            own, found = keys[keys_at[r] :], 0
            for j in range(groups[number, COMMON], seen[r]):
                tails[r, found] = own[j]
                found += 1
            for j in range(visible_at[r + 1] - visible_at[r]):
                if visible[visible_at[r] + j]:
                    tails[r, found] = own[seen[r] + j]
                    found += 1
            counts[r] = groups[number, COMMON] + found
            for j in range(found, -(-found // TOGETHER) * TOGETHER):
                tails[r, j] = tails[r, found - 1]
        number, first = number + 1, last
    groups[number, FIRST] = rows


@njit(nogil=True, error_model="numpy")
def score_part(
    first: int,
    last: int,
    common: int,
    queries: np.ndarray,
    size: int,
    keys: int,
    places: np.ndarray,
    counts: np.ndarray,
    tails: np.ndarray,
    scores: np.ndarray,
    thread: int,
    threads: int,
) -> None:
    """This thread's share of a group's scores.

    Args:
        first: row of the group.
        last: one behind its last row.
        common: keys that all see.
        queries: of all rows, those of a KV head together; more may stand behind them.  # [M, at least query heads * d]
        size: of a head (d).
        keys: address of the first KV head's; the others' lie behind.
        places: of the sequence's keys, in bytes behind these.
        counts: see `arrange`.  # [M]
        tails: likewise.
        scores: the result, of the rows of a wave.  # [WAVE, KV heads, query heads of each, most keys]
        thread: which.
        threads: of how many.
    """
    heads, per_head = scores.shape[1], scores.shape[2]
    whole = common // TOGETHER
    at, end = heads * (whole + 1) * thread // threads, heads * (whole + 1) * (thread + 1) // threads
    while at < end:
        head, group = at // (whole + 1), at % (whole + 1)
        own = keys + 4 * size * head
        if group == whole:
            for r in range(first, last):
                number = (counts[r] - common + TOGETHER - 1) // TOGETHER
                for g in range(per_head):
                    query = queries[r, (head * per_head + g) * size :][:size]
                    _score(query, own, tails[r], scores[r % WAVE, head, g, common:], number)
            at += 1
            continue
        number = min(min(whole - group, end - at), _CHUNK // TOGETHER)
        start = TOGETHER * group
        _fetch(own, places, start + TOGETHER * number, min(start + TOGETHER * number + _CHUNK, common), 4 * size)
        for r in range(first, last):
            for g in range(per_head):
                query = queries[r, (head * per_head + g) * size :][:size]
                _score(query, own, places[start:], scores[r % WAVE, head, g, start:], number)
        at += number


@njit(nogil=True, error_model="numpy")
def _score(query: np.ndarray, keys: int, places: np.ndarray, scores: np.ndarray, number: int) -> None:
    """Scores of `number` times `TOGETHER` keys."""
    at, size = 0, query.shape[0]
    while at + WIDE * LANES <= size:
        scores_of_four(
            query.ctypes.data + 4 * at, keys + 4 * at, places.ctypes.data, number, scores.ctypes.data, at > 0
        )
        at += WIDE * LANES
    while at < size:
        scores_of_one(query.ctypes.data + 4 * at, keys + 4 * at, places.ctypes.data, number, scores.ctypes.data, at > 0)
        at += LANES


@njit(nogil=True, error_model="numpy")
def _fetch(base: int, places: np.ndarray, first: int, last: int, size: int) -> None:
    """Ask for what will be wanted next; the CPU does not foresee it, since heads lie side by side."""
    for j in range(first, last):
        for line in range(0, size, _LINE):
            fetched(base + places[j] + line)


@njit(nogil=True, error_model="numpy")
def weigh_part(
    first: int, last: int, counts: np.ndarray, scores: np.ndarray, scale: float, thread: int, threads: int
) -> None:
    """This thread's share of a wave's softmax, in place."""
    heads = scores.shape[1] * scores.shape[2]
    for item in range((last - first) * heads * thread // threads, (last - first) * heads * (thread + 1) // threads):
        r, head = first + item // heads, item % heads
        _softmax(scores[r % WAVE, head // scores.shape[2], head % scores.shape[2], : counts[r]], np.float32(scale))


@njit(nogil=True, error_model="numpy")
def value_part(
    first: int,
    last: int,
    common: int,
    weights: np.ndarray,
    size: int,
    values: int,
    places: np.ndarray,
    counts: np.ndarray,
    tails: np.ndarray,
    out: np.ndarray,
    thread: int,
    threads: int,
) -> None:
    """This thread's share of a group's results; arguments as above.  # out [M, at least query heads * d]"""
    heads, per_head, parts = weights.shape[1], weights.shape[2], size // LANES
    at, end = heads * parts * thread // threads, heads * parts * (thread + 1) // threads
    while at < end:
        head, part = at // parts, at % parts
        number = min(parts - part, end - at)
        own = values + 4 * (size * head + LANES * part)
        for r in range(first, last):
            for g in range(per_head):
                _part_of(out[r], head * per_head + g, size, part, number)[:] = np.float32(0.0)
        for start in range(0, common, _CHUNK):
            stop = min(start + _CHUNK, common)
            _fetch(own, places, stop, min(stop + _CHUNK, common), 4 * LANES * number)
            for r in range(first, last):
                for g in range(per_head):
                    to = _part_of(out[r], head * per_head + g, size, part, number)
                    _sum(to, own, places[start:], weights[r % WAVE, head, g, start:], stop - start)
        for r in range(first, last):
            for g in range(per_head):
                to = _part_of(out[r], head * per_head + g, size, part, number)
                _sum(to, own, tails[r], weights[r % WAVE, head, g, common:], counts[r] - common)
        at += number


@njit(nogil=True, error_model="numpy")
def _part_of(row: np.ndarray, head: int, size: int, part: int, number: int) -> np.ndarray:
    """Some of a head's numbers in a row of all heads."""
    first = head * size + LANES * part
    return row[first : first + LANES * number]


@njit(nogil=True, error_model="numpy")
def _sum(out: np.ndarray, values: int, places: np.ndarray, weights: np.ndarray, count: int) -> None:
    to, at, left = out.ctypes.data, 0, out.shape[0]
    place, weight = places.ctypes.data, weights.ctypes.data
    while left >= WIDE * LANES:
        sums_of_four(to + 4 * at, values + 4 * at, place, count, weight)
        at, left = at + WIDE * LANES, left - WIDE * LANES
    if left >= 2 * LANES:
        sums_of_two(to + 4 * at, values + 4 * at, place, count, weight)
        at, left = at + 2 * LANES, left - 2 * LANES
    if left:
        sums_of_one(to + 4 * at, values + 4 * at, place, count, weight)


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "nnan"})
def _softmax(scores: np.ndarray, scale: float) -> None:
    highest = np.float32(-3.0e38)
    for j in range(scores.shape[0]):
        highest = max(highest, scores[j])
    whole = np.float32(0.0)
    for j in range(scores.shape[0]):
        scores[j] = exponential((scores[j] - highest) * scale)
        whole += scores[j]
    one = np.float32(1.0) / whole
    for j in range(scores.shape[0]):
        scores[j] *= one
