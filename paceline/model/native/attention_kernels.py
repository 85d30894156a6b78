"""The inner loops of attention over paged keys and values, read where they lie.

Scores of 16 keys are made at a time: a key's products with a query stay in vectors, and what is left of all 16 is
summed together, halves by halves, so that a key's score does not depend on its place among them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from paceline.model.native.vectors import F32, FLOATS, I8, I32, I64, LANES, ZERO, fetch, fma, load, splat, store

TOGETHER = LANES
"""Keys whose scores are made at a time: behind the places of a row's keys there must be so many more, less one."""
WIDE = 4
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


@intrinsic
def fetched(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    """Ask for the cache line at an address, which need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        fetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.uintp), generate


scores_of_one, scores_of_four = _scores_of(1), _scores_of(WIDE)
sums_of_one, sums_of_two, sums_of_four = _sums_of(1), _sums_of(2), _sums_of(WIDE)
