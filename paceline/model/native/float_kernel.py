"""Products of fp32 rows with tiles: a block is unpacked in registers and multiplied with as many rows as they allow."""

from __future__ import annotations

from functools import partial
from typing import Any

from numba.core import cgutils

from paceline.model.native.grid import Grid
from paceline.model.native.tiles import BLOCK, KINDS, LEVEL_BYTES, STEPS, inputs, kernel
from paceline.model.native.vectors import F32, FLOATS, I64, ZERO, fma, load, splat


def float_kernel(kind: int, rows: int, tiles: int) -> Any:
    """See `tiles.kernel`; `sums` has the sum of every block of x.  # x fp32 [rows, K], sums [rows, blocks]"""
    return kernel(f"paceline_product_{KINDS[kind]}_{rows}x{tiles}", partial(_body, kind=kind, rows=rows, tiles=tiles))


def _body(builder: Any, arguments: Any, *, kind: int, rows: int, tiles: int) -> None:
    grid = Grid(builder, arguments, kind, rows, tiles)
    products = {cell: cgutils.alloca_once(builder, FLOATS) for cell in grid.cells}
    with cgutils.for_range(builder, grid.blocks) as loop:
        for place in products.values():
            builder.store(ZERO, place)
        at_levels = builder.mul(loop.index, I64(LEVEL_BYTES[kind]))
        at_x = [builder.add(row, builder.mul(loop.index, I64(4 * BLOCK))) for row in grid.row_x]
        with cgutils.for_range(builder, I64(STEPS[kind])) as inner:
            places = [builder.add(tile, at_levels) for tile in grid.tile_levels]
            found = [inputs(builder, kind, grid.levels, place, inner.index) for place in places]
            for of_tiles in zip(*found, strict=True):
                for m in range(rows):
                    k = builder.add(at_x[m], builder.mul(I64(4), of_tiles[0][0]))
                    value = splat(builder, load(builder, grid.x, k, F32, 4))
                    for t in range(tiles):
                        result = fma(builder, of_tiles[t][1], value, builder.load(products[m, t]))
                        builder.store(result, products[m, t])
        for m, t in grid.cells:
            at = builder.add(grid.row_sums[m], builder.mul(loop.index, I64(4)))
            sum_of_x = load(builder, grid.sums, at, F32, 4)
            grid.add((m, t), loop.index, builder.load(products[m, t]), sum_of_x)
    grid.deliver()
