"""What all kernels have around their inner loops: rows and tiles, where they lie, and the delivery of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numba.core import cgutils

from paceline.model.native.tiles import LEVEL_BYTES, NUMBER_BYTES, scaled
from paceline.model.native.vectors import FLOATS, I8, I64, LANES, ZERO, load, store


class Grid:
    """Some rows by some tiles of one kernel (`tiles.kernel` says what its arguments are).

    Args:
        builder: writes the kernel.
        arguments: its own.
        kind: of the tiles.
        rows: how many.
        tiles: likewise.
    """

    def __init__(self, builder: Any, arguments: Sequence[Any], kind: int, rows: int, tiles: int) -> None:
        x, ldx, sums, lds, self.blocks, levels, numbers, out, self._ldo, self._add = arguments
        pointers = (builder.inttoptr(v, I8.as_pointer()) for v in (x, sums, levels, numbers, out))
        self.x, self.sums, self.levels, self._numbers, self._out = pointers
        self._builder, self._kind = builder, kind
        self.cells = [(m, t) for m in range(rows) for t in range(tiles)]
        self._whole = {cell: cgutils.alloca_once_value(builder, ZERO) for cell in self.cells}
        self.row_x = [builder.mul(I64(m), ldx) for m in range(rows)]
        self.row_sums = [builder.mul(I64(m), lds) for m in range(rows)]
        self.tile_size = builder.mul(I64(LEVEL_BYTES[kind]), self.blocks)
        self.tile_levels = [builder.mul(I64(t), self.tile_size) for t in range(tiles)]
        self._tile_numbers = [builder.mul(I64(t * NUMBER_BYTES[kind]), self.blocks) for t in range(tiles)]

    def add(self, cell: tuple[int, int], block: Any, product: Any, sum_of_x: Any) -> None:
        """Add a block's product to a cell, its scale and minimum applied."""
        builder, place = self._builder, self._whole[cell]
        at = builder.add(self._tile_numbers[cell[1]], builder.mul(block, I64(NUMBER_BYTES[self._kind])))
        before = builder.load(place)
        builder.store(scaled(builder, self._kind, self._numbers, at, product, sum_of_x, before), place)

    def deliver(self) -> None:
        """Write the results, or add them to what is there."""
        builder = self._builder
        for m, t in self.cells:
            at = builder.add(builder.mul(I64(4 * m), self._ldo), I64(4 * LANES * t))
            place = self._whole[m, t]
            with builder.if_then(self._add):
                builder.store(builder.fadd(load(builder, self._out, at, FLOATS, 4), builder.load(place)), place)
            store(builder, builder.load(place), self._out, at, 4)
