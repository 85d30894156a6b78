"""Attention of one query token over paged keys and values, read where they lie.

The query heads that share a KV head go together, so that keys are read once for all of them. The softmax takes its
maximum first: sums do not depend on how the context came about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from paceline.model.native.rows import exponential
from paceline.model.native.vectors import F32, FLOATS, I8, I64, LANES, ZERO, fma, load, splat, store, total

_TOGETHER = 4
"""Keys that are read at a time, so that a part of a query or of the result is loaded once for all of them."""


def _scores_of(count: int) -> Any:
    """Dot products of query heads with `count` keys."""

    @intrinsic
    def scores(
        typing_context: Any,  # noqa: ARG001
        queries: Any,  # noqa: ARG001
        group: Any,  # noqa: ARG001
        size: Any,  # noqa: ARG001
        keys: Any,  # noqa: ARG001
        places: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        distance: Any,  # noqa: ARG001
    ) -> Any:
        """Addresses; `places` has an offset in bytes for each key.  # queries [group, size], out [group, distance]"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            queries, group, size, keys, places, out, distance = arguments
            queries, places, out = (builder.inttoptr(v, I8.as_pointer()) for v in (queries, places, out))
            rows = _rows(builder, keys, places, count)
            sums = [cgutils.alloca_once(builder, FLOATS) for _ in rows]
            with cgutils.for_range(builder, group) as head:
                for place in sums:
                    builder.store(ZERO, place)
                first = builder.mul(head.index, builder.mul(size, I64(4)))
                with cgutils.for_range(builder, builder.sdiv(size, I64(LANES))) as part:
                    at = builder.mul(part.index, I64(4 * LANES))
                    query = load(builder, queries, builder.add(first, at), FLOATS, 4)
                    for row, place in zip(rows, sums, strict=True):
                        key = load(builder, row, at, FLOATS, 4)
                        builder.store(fma(builder, query, key, builder.load(place)), place)
                for i, place in enumerate(sums):
                    to = builder.add(builder.mul(head.index, builder.mul(distance, I64(4))), I64(4 * i))
                    store(builder, total(builder, builder.load(place)), out, to, 4)
            return context.get_dummy_value()

        return types.void(*_SEVEN), generate

    return scores


def _sums_of(count: int) -> Any:
    """`out += weight * value` for `count` values and all query heads."""

    @intrinsic
    def sums(
        typing_context: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        group: Any,  # noqa: ARG001
        size: Any,  # noqa: ARG001
        values: Any,  # noqa: ARG001
        places: Any,  # noqa: ARG001
        weights: Any,  # noqa: ARG001
        distance: Any,  # noqa: ARG001
    ) -> Any:
        """Addresses, as above.  # out [group, size], weights [group, distance]"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            out, group, size, values, places, weights, distance = arguments
            out, places, weights = (builder.inttoptr(v, I8.as_pointer()) for v in (out, places, weights))
            rows = _rows(builder, values, places, count)
            with cgutils.for_range(builder, group) as head:
                from_ = builder.mul(head.index, builder.mul(distance, I64(4)))
                scales = [
                    splat(builder, load(builder, weights, builder.add(from_, I64(4 * i)), F32, 4)) for i in range(count)
                ]
                first = builder.mul(head.index, builder.mul(size, I64(4)))
                with cgutils.for_range(builder, builder.sdiv(size, I64(LANES))) as part:
                    at = builder.mul(part.index, I64(4 * LANES))
                    sum_ = load(builder, out, builder.add(first, at), FLOATS, 4)
                    for row, scale in zip(rows, scales, strict=True):
                        sum_ = fma(builder, load(builder, row, at, FLOATS, 4), scale, sum_)
                    store(builder, sum_, out, builder.add(first, at), 4)
            return context.get_dummy_value()

        return types.void(*_SEVEN), generate

    return sums


_SEVEN = (types.uintp, types.intp, types.intp, types.uintp, types.uintp, types.uintp, types.intp)


def _rows(builder: Any, base: Any, places: Any, count: int) -> list[Any]:
    """Where `count` keys or values begin."""
    offsets = [load(builder, places, I64(8 * i), I64, 8) for i in range(count)]
    return [builder.inttoptr(builder.add(base, offset), I8.as_pointer()) for offset in offsets]


_scores, _scores_together = _scores_of(1), _scores_of(_TOGETHER)
_sums, _sums_together = _sums_of(1), _sums_of(_TOGETHER)


@njit(nogil=True, error_model="numpy")
def attend(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    kv_head: int,
    blocks: np.ndarray,
    block_size: int,
    seen: int,
    visible: np.ndarray,
    scale: float,
    scores: np.ndarray,
    places: np.ndarray,
    out: np.ndarray,
) -> None:
    """What one token's query heads read.

    Args:
        queries: of one KV head's group.  # [G, d]
        keys: the pool's.  # [slots, kv_heads, d]
        values: likewise.
        kv_head: which.
        blocks: of the sequence.  # [num_blocks]
        block_size: slots of a block.
        seen: keys from the first one that are all visible.
        visible: of the keys behind them, whether each is.  # bool [num_keys - seen]
        scale: of the scores.
        scores: scratch.  # [G, at least num_keys]
        places: scratch.  # int64 [at least num_keys]
        out: the result.  # [G, d]
    """
    group, size = queries.shape
    stride = keys.shape[1] * size * 4
    count = 0
    for j in range(seen + visible.shape[0]):
        if j < seen or visible[j - seen]:  # what is not seen leaves no gap, so a path in a tree is as if it were alone
            places[count] = (blocks[j // block_size] * block_size + j % block_size) * stride + kv_head * size * 4
            count += 1
    query, key, value, sum_ = queries.ctypes.data, keys.ctypes.data, values.ctypes.data, out.ctypes.data
    place, score, distance = places.ctypes.data, scores.ctypes.data, scores.shape[1]
    whole = count - count % _TOGETHER
    for i in range(0, whole, _TOGETHER):
        _scores_together(query, group, size, key, place + 8 * i, score + 4 * i, distance)
    for i in range(whole, count):
        _scores(query, group, size, key, place + 8 * i, score + 4 * i, distance)
    out[:] = np.float32(0.0)
    for g in range(group):
        _softmax(scores[g, :count], np.float32(scale))
    for i in range(0, whole, _TOGETHER):
        _sums_together(sum_, group, size, value, place + 8 * i, score + 4 * i, distance)
    for i in range(whole, count):
        _sums(sum_, group, size, value, place + 8 * i, score + 4 * i, distance)


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
