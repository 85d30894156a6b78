"""Products with weights that lie in tiles: 16 outputs side by side, 32 inputs a block, in one of `KINDS`.

A block is unpacked in registers and multiplied with as many rows as registers allow, in fp32. For every row and output
the operations and their order are the same however rows and tiles are grouped, so a row's result never depends on what
else is computed. Layout of a tile, block after block:

    Q4   16 x 16 bytes: byte [j][output] has level j (low half) and level j + 16; numbers [scale, minimum][output], f16
    Q8   32 x 16 bytes: int8 level [input][output]; numbers [scale][output], f16
    BF16, F32  32 x 16 numbers [input][output]; no scales
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from paceline.model.native.vectors import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I64,
    INTS,
    LANES,
    SHORTS,
    ZERO,
    constant,
    fma,
    load,
    splat,
    store,
)

BLOCK = 32
KINDS = ("Q4", "Q8", "BF16", "F32")
Q4, Q8, BF16 = range(3)
LEVEL_BYTES = (256, 512, 1024, 2048)
"""Of a block of a tile, by kind."""
NUMBER_BYTES = (64, 32, 0, 0)
"""Likewise of its scales and minimums."""
_HALF = BLOCK // 2
_UNROLLED = 4
"""Steps of a kernel's inner loop that are written out."""


def _pair(builder: Any, kind: int, levels: Any, offset: Any, j: Any) -> tuple[Any, Any]:
    """Weights (or levels) of inputs j and j + 16, as floats."""
    if kind == Q4:
        both = load(builder, levels, builder.add(offset, builder.mul(j, I64(LANES))), BYTES, LANES)
        wide = builder.zext(both, INTS)
        low, high = builder.and_(wide, constant(INTS, 15)), builder.lshr(wide, constant(INTS, 4))
        return builder.sitofp(low, FLOATS), builder.sitofp(high, FLOATS)
    size = LEVEL_BYTES[kind] // BLOCK
    low = builder.add(offset, builder.mul(j, I64(size)))
    at = (low, builder.add(low, I64(size * _HALF)))
    low, high = (_plain(builder, kind, levels, place) for place in at)
    return low, high


def _plain(builder: Any, kind: int, levels: Any, place: Any) -> Any:
    """Weights (or levels) of one input, as floats."""
    if kind == Q8:
        return builder.sitofp(builder.sext(load(builder, levels, place, BYTES, LANES), INTS), FLOATS)
    if kind == BF16:
        bits = builder.zext(load(builder, levels, place, SHORTS, 2 * LANES), INTS)
        return builder.bitcast(builder.shl(bits, constant(INTS, 16)), FLOATS)
    return load(builder, levels, place, FLOATS, 4 * LANES)


def _finish(builder: Any, kind: int, numbers: Any, offset: Any, product: Any, sum_of_x: Any, before: Any) -> Any:
    """What was summed before, and this block's product with its scale and minimum applied."""
    if not NUMBER_BYTES[kind]:
        return builder.fadd(before, product)
    scale = builder.fpext(load(builder, numbers, offset, HALVES, LANES), FLOATS)
    if kind == Q4:
        minimum = builder.fpext(load(builder, numbers, builder.add(offset, I64(2 * LANES)), HALVES, LANES), FLOATS)
        before = fma(builder, minimum, splat(builder, sum_of_x), before)
    return fma(builder, scale, product, before)


def _kernel(kind: int, rows: int, tiles: int) -> Any:
    """Products of some rows with some tiles that follow each other.

    Called as `kernel(x, ldx, sums, blocks, levels, numbers, out, ldo, add)`: addresses, and distances in floats;
    `sums` has the sum of every block of x.  # x [rows, ldx], sums [rows, blocks], out [rows, ldo]
    """

    @intrinsic
    def kernel(
        typing_context: Any,  # noqa: ARG001
        x: Any,  # noqa: ARG001
        ldx: Any,  # noqa: ARG001
        sums: Any,  # noqa: ARG001
        blocks: Any,  # noqa: ARG001
        levels: Any,  # noqa: ARG001
        numbers: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        ldo: Any,  # noqa: ARG001
        add: Any,  # noqa: ARG001
    ) -> Any:
        address, number = types.uintp, types.intp
        signature = types.void(address, number, address, number, address, address, address, number, types.boolean)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            builder.call(_function(builder.module, kind, rows, tiles), arguments)
            return context.get_dummy_value()

        return signature, generate

    return kernel


def _function(module: Any, kind: int, rows: int, tiles: int) -> Any:
    """The kernel as a function of its own, which is not copied to where it is called: that would take minutes."""
    name = f"paceline_product_{KINDS[kind]}_{rows}x{tiles}"
    if name in module.globals:
        return module.globals[name]
    arguments = [I64] * 8 + [ir.IntType(1)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    _body(builder, kind, rows, tiles, function.args)
    builder.ret_void()
    return function


def _body(builder: Any, kind: int, rows: int, tiles: int, arguments: Any) -> None:
    x, ldx, sums, blocks, levels, numbers, out, ldo, add = arguments
    x, sums, levels, numbers, out = (builder.inttoptr(v, I8.as_pointer()) for v in (x, sums, levels, numbers, out))
    grid = [(m, t) for m in range(rows) for t in range(tiles)]
    whole = {at: cgutils.alloca_once_value(builder, ZERO) for at in grid}
    products = {at: cgutils.alloca_once(builder, FLOATS) for at in grid}
    row_x = [builder.mul(I64(4 * m), ldx) for m in range(rows)]
    row_sums = [builder.mul(I64(4 * m), blocks) for m in range(rows)]
    tile_levels = [builder.mul(I64(t * LEVEL_BYTES[kind]), blocks) for t in range(tiles)]
    tile_numbers = [builder.mul(I64(t * NUMBER_BYTES[kind]), blocks) for t in range(tiles)]
    with cgutils.for_range(builder, blocks) as loop:
        for place in products.values():
            builder.store(ZERO, place)
        at_levels = builder.mul(loop.index, I64(LEVEL_BYTES[kind]))
        at_numbers = builder.mul(loop.index, I64(NUMBER_BYTES[kind]))
        at_x = [builder.add(row, builder.mul(loop.index, I64(4 * BLOCK))) for row in row_x]
        with cgutils.for_range(builder, I64(_HALF // _UNROLLED)) as inner:
            at_j = builder.mul(inner.index, I64(_UNROLLED))
            for step in range(_UNROLLED):
                j = builder.add(at_j, I64(step))
                pairs = [_pair(builder, kind, levels, builder.add(t, at_levels), j) for t in tile_levels]
                for m in range(rows):
                    for half in range(2):
                        k = builder.add(at_x[m], builder.mul(I64(4), builder.add(j, I64(half * _HALF))))
                        value = splat(builder, load(builder, x, k, F32, 4))
                        for t in range(tiles):
                            found = fma(builder, pairs[t][half], value, builder.load(products[m, t]))
                            builder.store(found, products[m, t])
        for m, t in grid:
            sum_of_x = load(builder, sums, builder.add(row_sums[m], builder.mul(loop.index, I64(4))), F32, 4)
            place = builder.add(tile_numbers[t], at_numbers)
            product, before = builder.load(products[m, t]), builder.load(whole[m, t])
            builder.store(_finish(builder, kind, numbers, place, product, sum_of_x, before), whole[m, t])
    for m, t in grid:
        at = builder.add(builder.mul(I64(4 * m), ldo), I64(4 * LANES * t))
        with builder.if_then(add):
            old = load(builder, out, at, FLOATS, 4)
            builder.store(builder.fadd(old, builder.load(whole[m, t])), whole[m, t])
        store(builder, builder.load(whole[m, t]), out, at, 4)


def _for_kind(kind: int) -> Any:
    """The product for one kind; rows and tiles in groups that fill the registers of a CPU with 16 of them."""
    one_by_four, two_by_two, four_by_one, one_by_one = (
        _kernel(kind, rows, tiles) for rows, tiles in ((1, 4), (2, 2), (4, 1), (1, 1))
    )
    level_bytes, number_bytes = LEVEL_BYTES[kind], NUMBER_BYTES[kind]

    def product(call: Any) -> None:
        x, ldx, sums, rows, blocks = call[0], call[1], call[2], call[3], call[4]
        levels, numbers, tile, last, out, ldo, add = (
            call[5],
            call[6],
            call[7],
            call[8],
            call[9],
            call[10],
            call[11] != 0,
        )
        tile_levels, tile_numbers = blocks * level_bytes, blocks * number_bytes
        while tile < last:
            group = 4 if tile + 4 <= last else 1
            w, n = levels + tile * tile_levels, numbers + tile * tile_numbers
            o = out + tile * 64
            row = 0
            while row < rows:
                xr, sr, orow = x + row * ldx * 4, sums + row * blocks * 4, o + row * ldo * 4
                if rows - row >= 4:
                    for t in range(group):
                        four_by_one(
                            xr, ldx, sr, blocks, w + t * tile_levels, n + t * tile_numbers, orow + t * 64, ldo, add
                        )
                    row += 4
                elif rows - row >= 2 and group == 4:
                    two_by_two(xr, ldx, sr, blocks, w, n, orow, ldo, add)
                    two_by_two(xr, ldx, sr, blocks, w + 2 * tile_levels, n + 2 * tile_numbers, orow + 128, ldo, add)
                    row += 2
                elif group == 4:
                    one_by_four(xr, ldx, sr, blocks, w, n, orow, ldo, add)
                    row += 1
                else:
                    one_by_one(xr, ldx, sr, blocks, w, n, orow, ldo, add)
                    row += 1
            tile += group

    # Code that Numba kept in other processes is linked by name: the same name for all kinds would mix them up.
    product.__name__ = product.__qualname__ = f"product_{KINDS[kind]}"
    return njit(nogil=True, error_model="numpy")(product)


_product_q4, _product_q8, _product_bf16, _product_f32 = (_for_kind(kind) for kind in range(len(KINDS)))


# Numba keeps what it compiled only of functions that stand in a module by themselves.
def _q4(call: Any) -> None:
    _product_q4(call)


def _q8(call: Any) -> None:
    _product_q8(call)


def _bf16(call: Any) -> None:
    _product_bf16(call)


def _f32(call: Any) -> None:
    _product_f32(call)


_PRODUCTS = (_q4, _q8, _bf16, _f32)
CALL = 12
"""Numbers that describe a product to its code: the address of its rows x (fp32 [rows, ldx]), ldx, the address of the
sum of every block of every row (see `block_sums`; fp32 [rows, blocks]), rows, blocks of 32 inputs, the addresses of the
weight's levels and of its scales and minimums, the first tile, one behind the last, the address of the result (fp32
[rows, ldo]), ldo, and whether to add to what is there instead of replacing it."""


@cache
def product_address(kind: str) -> int:
    """The address of the product with weights of one of `KINDS`, for `call_product`; compiled when first asked for."""
    function = _PRODUCTS[KINDS.index(kind)]
    return int(cfunc("void(CPointer(int64))", cache=True, error_model="numpy")(function).address)


@intrinsic
def call_product(typing_context: Any, address: Any, call: Any) -> Any:  # noqa: ARG001
    """Run the product at an address, as the `CALL` numbers at another address say."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer()])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(arguments[1], I64.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64, types.uintp), generate


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}, cache=True)
def block_sums(x: np.ndarray, sums: np.ndarray) -> None:
    """The sum of every 32 values of a row.  # x [K], sums [K / 32]"""
    for block in range(x.shape[0] // BLOCK):
        found = np.float32(0.0)
        for k in range(block * BLOCK, (block + 1) * BLOCK):
            found += x[k]
        sums[block] = found


@njit(nogil=True, error_model="numpy")
def multiply_part(
    weight: np.ndarray,
    x: np.ndarray,
    sums: np.ndarray,
    out: np.ndarray,
    column: int,
    add: bool,
    thread: int,
    threads: int,
    call: np.ndarray,
) -> None:
    """This thread's outputs of a product.

    Args:
        weight: address of the product, blocks, tiles, addresses of levels and numbers.  # int64 [5]
        x: as many rows as `out` has, or more.  # fp32 [at least rows, ldx]
        sums: of every block of every row.  # fp32 [rows * blocks]
        out: where the result goes.  # fp32 [rows, ldo]
        column: of `out` where it begins.
        add: to what is there.
        thread: which.
        threads: of how many.
        call: scratch.  # int64 [CALL]
    """
    groups = (weight[2] + 3) // 4
    call[0], call[1], call[2], call[3] = x.ctypes.data, x.shape[1], sums.ctypes.data, out.shape[0]
    call[4], call[5], call[6] = weight[1], weight[3], weight[4]
    call[7], call[8] = groups * thread // threads * 4, min(groups * (thread + 1) // threads * 4, weight[2])
    call[9], call[10], call[11] = out.ctypes.data + 4 * column, out.shape[1], add
    call_product(weight[0], call.ctypes.data)
