"""Vectors of 16 floats in LLVM's terms, which kernels are written in. How wide the CPU's are is LLVM's affair."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16
F32 = ir.FloatType()
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(F32, LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
BYTES = ir.VectorType(I8, LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)
INTS = ir.VectorType(I32, LANES)
ZERO = ir.Constant(FLOATS, [0.0] * LANES)


def constant(kind: Any, value: float) -> Any:
    """A vector of equal lanes."""
    return ir.Constant(kind, [value] * LANES)


def splat(builder: Any, value: Any) -> Any:
    """A float in all lanes."""
    undefined = ir.Constant(FLOATS, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, value, I32(0)), undefined, ir.Constant(INTS, [0] * LANES)
    )


def load(builder: Any, base: Any, offset: Any, kind: Any, align: int) -> Any:
    """What stands so many bytes behind `base`."""
    return builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()), align=align)


def store(builder: Any, value: Any, base: Any, offset: Any, align: int) -> None:
    """Write it so many bytes behind `base`."""
    builder.store(value, builder.bitcast(builder.gep(base, [offset]), value.type.as_pointer()), align=align)


def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z`, rounded once."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fma.v{LANES}f32"
    )
    return builder.call(function, [x, y, z])


def fetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address, which need not exist."""
    pointer, number = I8.as_pointer(), I32
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), I32(0), I32(3), I32(1)])


def total(builder: Any, vector: Any) -> Any:
    """The sum of all lanes, in a fixed order: halves are added until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(I32, width), list(range(a, a + width))) for a in (0, width))
        undefined = ir.Constant(vector.type, ir.Undefined)
        vector = builder.fadd(
            builder.shuffle_vector(vector, undefined, low), builder.shuffle_vector(vector, undefined, high)
        )
    return builder.extract_element(vector, I32(0))


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:  # noqa: ARG001 - Numba's convention
    """The float with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate
