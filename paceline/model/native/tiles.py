"""How weights lie in memory for products: in tiles of 16 outputs side by side, 32 inputs a block, in one of `KINDS`.

Layout of a tile, block after block:

    Q4   4 x 16 x 4 bytes: byte [j][output][i] has level 4 j + i (low half) and level 16 + 4 j + i;
         numbers [scale, minimum][output], f16
    Q8   8 x 16 x 4 bytes: int8 level 4 j + i as [j][output][i]; numbers [scale][output], f16
    BF16, F32  32 x 16 numbers [input][output]; no scales

Four levels of an output stand together, since CPUs multiply and add four pairs of bytes at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from paceline.model.native.vectors import FLOATS, HALVES, I64, INTS, LANES, SHORTS, constant, fma, load, splat

BLOCK = 32
KINDS = ("Q4", "Q8", "BF16", "F32")
Q4, Q8, BF16, F32_KIND = range(4)
LEVEL_BYTES = (256, 512, 1024, 2048)
"""Of a block of a tile, by kind."""
NUMBER_BYTES = (64, 32, 0, 0)
"""Likewise of its scales and minimums."""
STEPS = (4, 8, 8, 8)
"""Parts in which a block is unpacked, by kind."""
WORD_BYTES = 64
"""Of four levels (or eight of half a byte) of every output of a tile."""


def inputs(builder: Any, kind: int, levels: Any, offset: Any, step: Any) -> list[tuple[Any, Any]]:
    """One step's inputs, each with the weights (or levels) of all outputs as floats."""
    first = builder.mul(step, I64(4))
    if kind in (Q4, Q8):
        words = load(builder, levels, builder.add(offset, builder.mul(step, I64(WORD_BYTES))), INTS, WORD_BYTES)
    if kind == Q4:
        low, high = range(0, 32, 8), range(4, 32, 8)
        shifts = [(i, shift) for i, shift in enumerate(low)] + [(BLOCK // 2 + i, shift) for i, shift in enumerate(high)]
        return [
            (
                builder.add(first, I64(i)),
                builder.sitofp(
                    builder.and_(builder.lshr(words, constant(INTS, shift)), constant(INTS, 15)),
                    FLOATS,
                ),
            )
            for i, shift in shifts
        ]
    found = []
    for i in range(4):
        at = builder.add(first, I64(i))
        if kind == Q8:
            top = builder.shl(words, constant(INTS, 24 - 8 * i))
            found.append((at, builder.sitofp(builder.ashr(top, constant(INTS, 24)), FLOATS)))
        else:
            found.append((at, _plain(builder, kind, levels, offset, at)))
    return found


def _plain(builder: Any, kind: int, levels: Any, offset: Any, at: Any) -> Any:
    """Weights of one input, as floats."""
    place = builder.add(offset, builder.mul(at, I64(LEVEL_BYTES[kind] // BLOCK)))
    if kind == BF16:
        bits = builder.zext(load(builder, levels, place, SHORTS, 2 * LANES), INTS)
        return builder.bitcast(builder.shl(bits, constant(INTS, 16)), FLOATS)
    return load(builder, levels, place, FLOATS, 4 * LANES)


def scaled(builder: Any, kind: int, numbers: Any, offset: Any, product: Any, sum_of_x: Any, before: Any) -> Any:
    """What was summed before, and a block's product with its scale and minimum applied."""
    if not NUMBER_BYTES[kind]:
        return builder.fadd(before, product)
    scale = builder.fpext(load(builder, numbers, offset, HALVES, LANES), FLOATS)
    if kind == Q4:
        minimum = builder.fpext(load(builder, numbers, builder.add(offset, I64(2 * LANES)), HALVES, LANES), FLOATS)
        before = fma(builder, minimum, splat(builder, sum_of_x), before)
    return fma(builder, scale, product, before)


def kernel(name: str, body: Any) -> Any:
    """Products of some rows with some tiles that follow each other, as a function for compiled code.

    Called as `kernel(x, ldx, sums, lds, blocks, levels, numbers, out, ldo, add)`: addresses; `ldx` and `lds`, the
    distances between rows of `x` and `sums`, in bytes, `ldo` in floats.

    Args:
        name: its own.
        body: writes it; called with a builder and the arguments.
    """

    @intrinsic
    def function(
        typing_context: Any,  # noqa: ARG001
        x: Any,  # noqa: ARG001
        ldx: Any,  # noqa: ARG001
        sums: Any,  # noqa: ARG001
        lds: Any,  # noqa: ARG001
        blocks: Any,  # noqa: ARG001
        levels: Any,  # noqa: ARG001
        numbers: Any,  # noqa: ARG001
        out: Any,  # noqa: ARG001
        ldo: Any,  # noqa: ARG001
        add: Any,  # noqa: ARG001
    ) -> Any:
        address, number = types.uintp, types.intp
        signature = types.void(
            address, number, address, number, number, address, address, address, number, types.boolean
        )

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            builder.call(_function(builder.module, name, body), arguments)
            return context.get_dummy_value()

        return signature, generate

    return function


def _function(module: Any, name: str, body: Any) -> Any:
    """The kernel as a function of its own, which is not copied to where it is called: that would take minutes."""
    if name in module.globals:
        return module.globals[name]
    arguments = [I64] * 9 + [ir.IntType(1)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    body(builder, function.args)
    builder.ret_void()
    return function
