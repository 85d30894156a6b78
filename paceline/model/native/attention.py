"""Attention of one query token over paged keys and values, read where they lie.

Scores of 16 keys are made at a time: a key's products with a query stay in vectors, and what is left of all 16 is
summed together, halves by halves, so that a key's score does not depend on its place among them. The query heads that
share a KV head go over the same keys one after the other while these are in the first cache. The softmax takes its
maximum first: sums do not depend on how the context came about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from paceline.model.native.rows import exponential
from paceline.model.native.vectors import F32, FLOATS, I8, I32, I64, LANES, ZERO, fma, load, splat, store

TOGETHER = LANES
"""Keys whose scores are made at a time: behind the places of a row's keys there must be so many more, less one."""
_CHUNK = 64
"""Keys that all query heads go over before the next ones (16 KB of a head of 64)."""
_WIDE = 4
"""Vectors of a head that are held in registers: 64 numbers."""


def _scores_of(vectors: int) -> Any:
    """Dot products of a part of one query head with the next keys, `TOGETHER` at a time."""

    @intrinsic
    def scores(
        typing_context: Any,  # noqa: ARG001
        query: Any,  # noqa: ARG001
        keys: Any,  # noqa: ARG001
        places: Any,  # noqa: ARG001
        groups: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        add: Any,  # noqa: ARG001
    ) -> Any:
        """Addresses; `places` has an offset in bytes for each key; `add` to what is there.  # out [groups, TOGETHER]"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            query, keys, places, groups, out, add = arguments
            query, places, out = (builder.inttoptr(v, I8.as_pointer()) for v in (query, places, out))
            parts = [load(builder, query, I64(4 * LANES * i), FLOATS, 4) for i in range(vectors)]
            with cgutils.for_range(builder, groups) as group:
                at = builder.mul(group.index, I64(8 * TOGETHER))

                def products(i: int) -> Any:
                    offset = load(builder, places, builder.add(at, I64(8 * i)), I64, 8)
                    key = builder.inttoptr(builder.add(keys, offset), I8.as_pointer())
                    found = ZERO
                    for j, part in enumerate(parts):
                        found = fma(builder, part, load(builder, key, I64(4 * LANES * j), FLOATS, 4), found)
                    return found

                to = builder.mul(group.index, I64(4 * TOGETHER))
                place = cgutils.alloca_once_value(builder, _summed(builder, products, 0, TOGETHER))
                with builder.if_then(add):
                    builder.store(builder.fadd(load(builder, out, to, FLOATS, 4), builder.load(place)), place)
                store(builder, builder.load(place), out, to, 4)
            return context.get_dummy_value()

        return types.void(*(types.uintp,) * 3, types.intp, types.uintp, types.boolean), generate

    return scores


def _summed(builder: Any, vector: Any, first: int, count: int) -> Any:
    """What is left of the vectors `first .. first + count` in one: 16 / count partial sums of each, in order."""
    if count == 1:
        return vector(first)
    half, left = count // 2, LANES // count
    a, b = (_summed(builder, vector, at, half) for at in (first, first + half))
    lower = [i for start in range(0, 2 * LANES, 2 * left) for i in range(start, start + left)]
    low, high = (
        builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, LANES), [i + by for i in lower]))
        for by in (0, left)
    )
    return builder.fadd(low, high)


def _sums_of(vectors: int) -> Any:
    """`out += weight * value` over values, for a part of one query head."""

    @intrinsic
    def sums(
        typing_context: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        values: Any,  # noqa: ARG001
        places: Any,  # noqa: ARG001
        count: Any,  # noqa: ARG001
        weights: Any,  # noqa: ARG001
    ) -> Any:
        """Addresses; `places` as above.  # out [16 * vectors], weights [count]"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            out, values, places, count, weights = arguments
            out, places, weights = (builder.inttoptr(v, I8.as_pointer()) for v in (out, places, weights))
            found = [
                cgutils.alloca_once_value(builder, load(builder, out, I64(4 * LANES * i), FLOATS, 4))
                for i in range(vectors)
            ]
            with cgutils.for_range(builder, count) as loop:
                offset = load(builder, places, builder.mul(loop.index, I64(8)), I64, 8)
                value = builder.inttoptr(builder.add(values, offset), I8.as_pointer())
                weight = splat(builder, load(builder, weights, builder.mul(loop.index, I64(4)), F32, 4))
                for i, place in enumerate(found):
                    part = load(builder, value, I64(4 * LANES * i), FLOATS, 4)
                    builder.store(fma(builder, part, weight, builder.load(place)), place)
            for i, place in enumerate(found):
                store(builder, builder.load(place), out, I64(4 * LANES * i), 4)
            return context.get_dummy_value()

        return types.void(*(types.uintp,) * 3, types.intp, types.uintp), generate

    return sums


_scores, _scores_wide = _scores_of(1), _scores_of(_WIDE)
_sums, _sums_wide = _sums_of(1), _sums_of(_WIDE)


@njit(nogil=True, error_model="numpy")
def attend(
    queries: np.ndarray,
    keys: int,
    values: int,
    places: np.ndarray,
    seen: int,
    visible: np.ndarray,
    scale: float,
    scores: np.ndarray,
    chosen: np.ndarray,
    out: np.ndarray,
) -> None:
    """What one token's query heads read.

    Args:
        queries: of one KV head's group.  # [G, d]
        keys: address of that KV head's keys.
        values: likewise.
        places: of the sequence's keys and values, in bytes behind these.  # [num_keys + TOGETHER - 1]
        seen: keys from the first one that are all visible.
        visible: of the keys behind them, whether each is.  # bool [num_keys - seen]
        scale: of the scores.
        scores: scratch.  # [G, num_keys rounded up to TOGETHER]
        chosen: scratch.  # int64 [num_keys + TOGETHER - 1]
        out: the result.  # [G, d]
    """
    count, place = seen, places.ctypes.data
    if visible.shape[0]:  # what is not seen leaves no gap, so a path in a tree is as if it were alone
        chosen[:seen] = places[:seen]
        for j in range(visible.shape[0]):
            if visible[j]:
                chosen[count] = places[seen + j]
                count += 1
        chosen[count : count + TOGETHER - 1] = chosen[count - 1]
        place = chosen.ctypes.data
    for first in range(0, count, _CHUNK):
        _scores_of_chunk(queries, keys, place, scores, first, min(first + _CHUNK, count))
    out[:] = np.float32(0.0)
    for g in range(queries.shape[0]):
        _softmax(scores[g, :count], np.float32(scale))
    for first in range(0, count, _CHUNK):
        _values_of_chunk(out, values, place, scores, first, min(first + _CHUNK, count))


@njit(nogil=True, error_model="numpy")
def _scores_of_chunk(queries: np.ndarray, keys: int, place: int, scores: np.ndarray, first: int, last: int) -> None:
    size, groups = queries.shape[1], (last - first + TOGETHER - 1) // TOGETHER
    for g in range(queries.shape[0]):
        query, to = queries[g].ctypes.data, scores[g].ctypes.data + 4 * first
        at = 0
        while at + _WIDE * LANES <= size:
            _scores_wide(query + 4 * at, keys + 4 * at, place + 8 * first, groups, to, at > 0)
            at += _WIDE * LANES
        while at < size:
            _scores(query + 4 * at, keys + 4 * at, place + 8 * first, groups, to, at > 0)
            at += LANES


@njit(nogil=True, error_model="numpy")
def _values_of_chunk(out: np.ndarray, values: int, place: int, scores: np.ndarray, first: int, last: int) -> None:
    size = out.shape[1]
    for g in range(out.shape[0]):
        to, weights = out[g].ctypes.data, scores[g].ctypes.data + 4 * first
        at = 0
        while at + _WIDE * LANES <= size:
            _sums_wide(to + 4 * at, values + 4 * at, place + 8 * first, last - first, weights)
            at += _WIDE * LANES
        while at < size:
            _sums(to + 4 * at, values + 4 * at, place + 8 * first, last - first, weights)
            at += LANES


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
