"""Products of fp32 rows with tiles: a block is unpacked in registers and multiplied with as many rows as they allow."""

from __future__ import annotations

from functools import partial
from typing import Any

from numba.core import cgutils

from paceline.model.native.tiles import BLOCK, KINDS, LEVEL_BYTES, NUMBER_BYTES, STEPS, inputs, kernel, scaled
from paceline.model.native.vectors import F32, FLOATS, I8, I64, LANES, ZERO, fma, load, splat, store


def float_kernel(kind: int, rows: int, tiles: int) -> Any:
    """See `tiles.kernel`; `sums` has the sum of every block of x.  # x fp32 [rows, K], sums [rows, blocks]"""
    return kernel(f"paceline_product_{KINDS[kind]}_{rows}x{tiles}", partial(_body, kind=kind, rows=rows, tiles=tiles))


def _body(builder: Any, arguments: Any, *, kind: int, rows: int, tiles: int) -> None:
    x, ldx, sums, lds, blocks, levels, numbers, out, ldo, add = arguments
    x, sums, levels, numbers, out = (builder.inttoptr(v, I8.as_pointer()) for v in (x, sums, levels, numbers, out))
    grid = [(m, t) for m in range(rows) for t in range(tiles)]
    whole = {at: cgutils.alloca_once_value(builder, ZERO) for at in grid}
    products = {at: cgutils.alloca_once(builder, FLOATS) for at in grid}
    row_x = [builder.mul(I64(m), ldx) for m in range(rows)]
    row_sums = [builder.mul(I64(m), lds) for m in range(rows)]
    tile_levels = [builder.mul(I64(t * LEVEL_BYTES[kind]), blocks) for t in range(tiles)]
    tile_numbers = [builder.mul(I64(t * NUMBER_BYTES[kind]), blocks) for t in range(tiles)]
    with cgutils.for_range(builder, blocks) as loop:
        for place in products.values():
            builder.store(ZERO, place)
        at_levels = builder.mul(loop.index, I64(LEVEL_BYTES[kind]))
        at_numbers = builder.mul(loop.index, I64(NUMBER_BYTES[kind]))
        at_x = [builder.add(row, builder.mul(loop.index, I64(4 * BLOCK))) for row in row_x]
        with cgutils.for_range(builder, I64(STEPS[kind])) as inner:
            found = [inputs(builder, kind, levels, builder.add(t, at_levels), inner.index) for t in tile_levels]
            for of_tiles in zip(*found, strict=True):
                for m in range(rows):
                    k = builder.add(at_x[m], builder.mul(I64(4), of_tiles[0][0]))
                    value = splat(builder, load(builder, x, k, F32, 4))
                    for t in range(tiles):
                        result = fma(builder, of_tiles[t][1], value, builder.load(products[m, t]))
                        builder.store(result, products[m, t])
        for m, t in grid:
            sum_of_x = load(builder, sums, builder.add(row_sums[m], builder.mul(loop.index, I64(4))), F32, 4)
            place = builder.add(tile_numbers[t], at_numbers)
            product, before = builder.load(products[m, t]), builder.load(whole[m, t])
            builder.store(scaled(builder, kind, numbers, place, product, sum_of_x, before), whole[m, t])
    for m, t in grid:
        deliver(builder, whole[m, t], out, builder.add(builder.mul(I64(4 * m), ldo), I64(4 * LANES * t)), add)


def deliver(builder: Any, place: Any, out: Any, at: Any, add: Any) -> None:
    """Write a result, or add it to what is there."""
    with builder.if_then(add):
        builder.store(builder.fadd(load(builder, out, at, FLOATS, 4), builder.load(place)), place)
    store(builder, builder.load(place), out, at, 4)
