"""Which tile serves a product: found by trying on an H200 (`benchmarks/gpu/products.py`), and by shape alone."""

from __future__ import annotations

from dataclasses import replace

from paceline.model.kernels.products import Tile

FEW, SOME = 16, 64
"""Rows of the two tiles. Beyond the second a library's products are faster."""
ROOMY = (9, 10)
"""Major compute capabilities whose shared memory holds these tiles (200 KB): Hopper, and Blackwell of data centres."""
_LONG = 1024
"""Inner dimension from which a program takes more of it at a time."""


def tile_for(num_rows: int, num_columns: int, inner: int, element_size: int = 2) -> Tile | None:
    """The tile of a product of so many rows; None where PyTorch's own product is faster.

    Args:
        num_rows: of the input.
        num_columns: outputs of a row.
        inner: inputs of a row.
        element_size: bytes of a number.
    """
    if num_rows > SOME:
        return None
    tile = _of_bf16(num_rows, num_columns, inner)
    return replace(tile, inner=tile.inner * 2 // element_size) if element_size > 2 else tile


def _of_bf16(num_rows: int, num_columns: int, inner: int) -> Tile:
    rows = FEW if num_rows <= FEW else SOME
    if num_columns >= 1 << 15:
        return Tile(rows, 128, 128 if inner >= _LONG else 64, 4, 4 if rows == SOME else 5)
    if num_columns >= 1 << 13:
        return Tile(rows, 64, 128, 4, 4)
    if num_columns >= 900:
        return Tile(rows, 32, 256, 4, 4) if inner >= _LONG else Tile(rows, 32, 64, 4, 5)
    return Tile(rows, 16, 256, 4, 4) if inner >= _LONG else Tile(rows, 16, 64, 4, 5)
