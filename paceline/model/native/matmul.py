"""Products with weights in tiles (`tiles.py`), of fp32 rows or of rows in 8 bits.

For every row and output the operations and their order are the same however rows and tiles are grouped, so a row's
result never depends on what else is computed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from paceline.compiled import address_of, compiled
from paceline.model.native.float_kernel import float_kernel
from paceline.model.native.integer_kernel import integer_kernel
from paceline.model.native.tiles import BLOCK, KINDS, LEVEL_BYTES, NUMBER_BYTES
from paceline.model.native.vectors import I64

_CHUNK = 64
"""Rows that all tiles are multiplied with before the next ones, while they are in a near cache."""
INTEGER = 2
"""So many of `KINDS`, the first, can be multiplied with rows in 8 bits."""


def _over(kind: int) -> Any:
    """The product of fp32 rows; rows and tiles in groups that fill the registers of a CPU with 16 of them."""
    one_by_four, two_by_two, three_by_one, four_by_one, one_by_one = (
        float_kernel(kind, rows, tiles) for rows, tiles in ((1, 4), (2, 2), (3, 1), (4, 1), (1, 1))
    )
    level_bytes, number_bytes = LEVEL_BYTES[kind], NUMBER_BYTES[kind]

    def product(call: Any) -> None:
        x, ldx, sums, lds, rows, blocks = call[0], call[1], call[2], call[3], call[4], call[5]
        levels, numbers, tile, last = call[6], call[7], call[8], call[9]
        out, ldo, add = call[10], call[11], call[12] != 0
        tile_levels, tile_numbers = blocks * level_bytes, blocks * number_bytes
        while tile < last:
            group = 4 if tile + 4 <= last else 1
            w, n = levels + tile * tile_levels, numbers + tile * tile_numbers
            o = out + tile * 64
            row = 0
            while row < rows:
                xr, sr, orow = x + row * ldx, sums + row * lds, o + row * ldo * 4
                if rows - row >= 4:
                    for t in range(group):
                        wt, nt = w + t * tile_levels, n + t * tile_numbers
                        four_by_one(xr, ldx, sr, lds, blocks, wt, nt, orow + t * 64, ldo, add)
                    row += 4
                elif rows - row == 3:
                    for t in range(group):
                        wt, nt = w + t * tile_levels, n + t * tile_numbers
                        three_by_one(xr, ldx, sr, lds, blocks, wt, nt, orow + t * 64, ldo, add)
                    row += 3
                elif rows - row >= 2 and group == 4:
                    w2, n2 = w + 2 * tile_levels, n + 2 * tile_numbers
                    two_by_two(xr, ldx, sr, lds, blocks, w, n, orow, ldo, add)
                    two_by_two(xr, ldx, sr, lds, blocks, w2, n2, orow + 128, ldo, add)
                    row += 2
                elif group == 4:
                    one_by_four(xr, ldx, sr, lds, blocks, w, n, orow, ldo, add)
                    row += 1
                else:
                    one_by_one(xr, ldx, sr, lds, blocks, w, n, orow, ldo, add)
                    row += 1
            tile += group

    return _named(product, f"product_{KINDS[kind]}")


def _integer_over(kind: int) -> Any:
    """The product of rows in 8 bits: four with each tile, which a CPU with 16 registers can hold."""
    one, two, three, four = (integer_kernel(kind, rows) for rows in (1, 2, 3, 4))
    level_bytes, number_bytes = LEVEL_BYTES[kind], NUMBER_BYTES[kind]

    def product(call: Any) -> None:
        x, ldx, sums, lds, rows, blocks = call[0], call[1], call[2], call[3], call[4], call[5]
        levels, numbers, tile, last = call[6], call[7], call[8], call[9]
        out, ldo, add = call[10], call[11], call[12] != 0
        for first in range(0, rows, _CHUNK):
            chunk = min(_CHUNK, rows - first)
            xc, sc, oc = x + first * ldx, sums + first * lds, out + first * ldo * 4
            for t in range(tile, last):
                w, n, o = levels + t * blocks * level_bytes, numbers + t * blocks * number_bytes, oc + t * 64
                for row in range(0, chunk - 3, 4):
                    four(xc + row * ldx, ldx, sc + row * lds, lds, blocks, w, n, o + row * ldo * 4, ldo, add)
                row, left = chunk // 4 * 4, chunk % 4
                xr, sr, orow = xc + row * ldx, sc + row * lds, o + row * ldo * 4
                if left == 1:
                    one(xr, ldx, sr, lds, blocks, w, n, orow, ldo, add)
                elif left == 2:
                    two(xr, ldx, sr, lds, blocks, w, n, orow, ldo, add)
                elif left:
                    three(xr, ldx, sr, lds, blocks, w, n, orow, ldo, add)

    return _named(product, f"integer_product_{KINDS[kind]}")


def _named(product: Any, name: str) -> Any:
    """Compiled code that Numba kept in other processes is linked by name: one for all kinds would mix them up."""
    product.__name__ = product.__qualname__ = name
    return njit(nogil=True, error_model="numpy")(product)


_product_q4, _product_q8, _product_bf16, _product_f32 = (_over(kind) for kind in range(len(KINDS)))
_integer_product_q4, _integer_product_q8 = (_integer_over(kind) for kind in range(INTEGER))


# Numba keeps what it compiled only of functions that stand in a module by themselves.
def _q4(call: Any) -> None:
    _product_q4(call)


def _q8(call: Any) -> None:
    _product_q8(call)


def _bf16(call: Any) -> None:
    _product_bf16(call)


def _f32(call: Any) -> None:
    _product_f32(call)


def _integer_q4(call: Any) -> None:
    _integer_product_q4(call)


def _integer_q8(call: Any) -> None:
    _integer_product_q8(call)


_PRODUCTS = ((_q4, _q8, _bf16, _f32), (_integer_q4, _integer_q8))
CALL = 13
"""Numbers that describe a product to its code: the address of its rows x, the bytes from one to the next, the same of
what is known of every block (`block_sums` or `round_row`), rows, blocks of 32 inputs, the addresses of the weight's
levels and of its scales and minimums, the first tile, one behind the last, the address of the result (fp32 [rows,
ldo]), ldo, and whether to add to what is there instead of replacing it."""
WEIGHT = 6
"""Numbers that describe a weight: the address of its product, whether that takes rows in 8 bits, blocks, tiles, and the
addresses of levels and numbers."""


@cache
def product_address(kind: str, integer: bool) -> int:
    """The address of the product with weights of one of `KINDS`, for `call_product`; compiled when first asked for."""
    return address_of(_PRODUCTS[integer][KINDS.index(kind)], "void(CPointer(int64))")


@intrinsic
def call_product(typing_context: Any, address: Any, call: Any) -> Any:  # noqa: ARG001
    """Run the product at an address, as the `CALL` numbers at another address say."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer()])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(arguments[1], I64.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64, types.uintp), generate


@compiled(fastmath={"reassoc", "contract", "nsz"})
def block_sums(x: np.ndarray, sums: np.ndarray) -> None:
    """The sum of every 32 values of a row.  # x [K], sums [K / 32]"""
    for block in range(x.shape[0] // BLOCK):
        found = np.float32(0.0)
        for k in range(block * BLOCK, (block + 1) * BLOCK):
            found += x[k]
        sums[block] = found


@compiled(fastmath={"contract", "nsz"})
def round_row(x: np.ndarray, rounded: np.ndarray, scales: np.ndarray) -> None:
    """A row in 8 bits: whole numbers of -127 .. 127 and a scale for every 32; NaN where the row is not finite.

    x [K], rounded int8 [K], scales (the scale, then the sum of whole numbers) [K / 32 * 2]
    """
    for block in range(x.shape[0] // BLOCK):
        first = block * BLOCK
        largest, invalid = np.float32(0.0), np.float32(0.0)
        for k in range(first, first + BLOCK):
            largest = max(largest, abs(x[k]))
            invalid += x[k] * np.float32(0.0)
        inverse = np.float32(127.0) / largest if largest > np.float32(0.0) else np.float32(0.0)
        total = np.int32(0)
        for k in range(first, first + BLOCK):
            whole = np.rint(x[k] * inverse)
            number = np.int32(min(max(whole, np.float32(-127.0)), np.float32(127.0)))
            rounded[k] = number
            total += number
        scales[2 * block] = largest / np.float32(127.0) + invalid
        scales[2 * block + 1] = np.float32(total)


@njit(nogil=True, error_model="numpy")
def multiply_part(
    weight: np.ndarray,
    x: np.ndarray,
    sums: np.ndarray,
    rounded: np.ndarray,
    scales: np.ndarray,
    out: np.ndarray,
    column: int,
    add: bool,
    thread: int,
    threads: int,
    call: np.ndarray,
) -> None:
    """This thread's outputs of a product.

    Args:
        weight: what `WEIGHT` says.  # int64 [WEIGHT]
        x: as many rows as `out` has, or more.  # fp32 [at least rows, ldx]
        sums: of every block of every row.  # fp32 [at least rows * blocks]
        rounded: the same rows in 8 bits.  # int8 [at least rows, ldr]
        scales: theirs.  # fp32 [at least rows * blocks * 2]
        out: where the result goes.  # fp32 [rows, ldo]
        column: of `out` where it begins.
        add: to what is there.
        thread: which.
        threads: of how many.
        call: scratch.  # int64 [CALL]
    """
    groups = (weight[3] + 3) // 4
    if weight[1]:
        call[0], call[1], call[2], call[3] = rounded.ctypes.data, rounded.shape[1], scales.ctypes.data, 8 * weight[2]
    else:
        call[0], call[1], call[2], call[3] = x.ctypes.data, 4 * x.shape[1], sums.ctypes.data, 4 * weight[2]
    call[4], call[5], call[6], call[7] = out.shape[0], weight[2], weight[4], weight[5]
    call[8], call[9] = groups * thread // threads * 4, min(groups * (thread + 1) // threads * 4, weight[3])
    call[10], call[11], call[12] = out.ctypes.data + 4 * column, out.shape[1], add
    call_product(weight[0], call.ctypes.data)
