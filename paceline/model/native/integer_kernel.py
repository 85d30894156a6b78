"""Products of rows in 8 bits with tiles of 4 or 8 bits, in whole numbers.

A row's block of 32 inputs is q * d: whole numbers of -127 .. 127 and a scale (`rows.round_row`). The sum of a block's
products is exact whatever instructions make it, so the result is the same on all CPUs that have any of them: AVX2
(`maddubs.py`) or VNNI, which adds u8 x s8 products of four neighbours to 32 bits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from paceline.model.native.grid import Grid
from paceline.model.native.maddubs import Maddubs, joined
from paceline.model.native.tiles import BLOCK, KINDS, LEVEL_BYTES, Q4, STEPS, WORD_BYTES, kernel
from paceline.model.native.vectors import F32, FLOATS, I32, I64, constant, fetch, fma, load, splat


@cache
def integer_instructions() -> str:
    """`vnni512`, `vnni256` or `avx2`, the first that this CPU has; nothing if it has none of them."""
    has = binding.get_host_cpu_features()
    if has.get("avx512vnni") and has.get("avx512bw"):
        return "vnni512"
    if has.get("avxvnni") or (has.get("avx512vnni") and has.get("avx512vl")):
        return "vnni256"
    return "avx2" if has.get("avx2") else ""


def integer_kernel(kind: int, rows: int) -> Any:
    """See `tiles.kernel`, for one tile; `sums` has the scale of every block of x and the sum of its whole numbers.

    x int8 [rows, K], sums fp32 [rows, blocks, 2]
    """
    which = integer_instructions()
    dots = Maddubs(kind) if which == "avx2" else _Vnni(kind, 1 if which == "vnni512" else 2)
    name = f"paceline_integer_product_{which}_{KINDS[kind]}_{rows}"
    return kernel(name, partial(_body, kind=kind, rows=rows, products=dots.products))


Products = Callable[[Any, Any, Sequence[Any]], list[Any]]
"""Of one block of a tile with rows, as 32-bit sums of all outputs: builder, address of the block's levels and of every
row's block of x -> one for every row. Levels of 8 bits are taken as level + 128."""


def _body(builder: Any, arguments: Any, *, kind: int, rows: int, products: Products) -> None:
    grid = Grid(builder, arguments, kind, rows, 1)
    with cgutils.for_range(builder, grid.blocks) as loop:
        at = builder.add(arguments[5], builder.mul(loop.index, I64(LEVEL_BYTES[kind])))
        block = builder.mul(loop.index, I64(BLOCK))
        at_x = [builder.add(arguments[0], builder.add(row, block)) for row in grid.row_x]
        # The next tile's levels are wanted next, and a tile is too short for the CPU to foresee that.
        for line in range(0, LEVEL_BYTES[kind], WORD_BYTES):
            fetch(builder, builder.add(at, builder.add(grid.tile_size, I64(line))))
        for m, found in enumerate(products(builder, at, at_x)):
            place = builder.add(grid.row_sums[m], builder.mul(loop.index, I64(8)))
            scale = load(builder, grid.sums, place, F32, 4)
            sum_of_q = load(builder, grid.sums, builder.add(place, I64(4)), F32, 4)
            product = builder.sitofp(found, FLOATS)
            if kind != Q4:  # this takes the 128 back exactly
                product = fma(builder, constant(FLOATS, -128.0), splat(builder, sum_of_q), product)
            product = builder.fmul(product, splat(builder, scale))
            grid.add((m, 0), loop.index, product, builder.fmul(scale, sum_of_q))
    grid.deliver()


class _Vnni:
    """With `vpdpbusd`.

    Args:
        kind: of the tiles.
        vectors: how many of the CPU's hold four levels of 16 outputs.
    """

    def __init__(self, kind: int, vectors: int) -> None:
        self._kind, self._vectors = kind, vectors
        self._size = WORD_BYTES // vectors
        self._bytes, self._shorts, self._ints = (
            ir.VectorType(ir.IntType(8 * size), self._size // size) for size in (1, 2, 4)
        )

    def products(self, builder: Any, levels: Any, at_x: Sequence[Any]) -> list[Any]:
        """See `Products`."""
        name = f"llvm.x86.avx512.vpdpbusd.{8 * self._size}"
        add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(self._ints, [self._ints] * 3), name)
        nothing = ir.Constant(self._ints, [0] * (self._size // 4))
        found = [[nothing] * self._vectors for _ in at_x]
        for step in range(STEPS[self._kind]):
            for first, weights in self._unpack(builder, builder.add(levels, I64(step * WORD_BYTES)), 4 * step):
                for sums, x in zip(found, at_x, strict=True):
                    inputs = self._repeated(builder, _load(builder, builder.add(x, I64(first)), I32, 4))
                    for v, levels_of in enumerate(weights):
                        sums[v] = builder.call(add, [sums[v], builder.bitcast(levels_of, self._ints), inputs])
        return [joined(builder, sums) for sums in found]

    def _unpack(self, builder: Any, at: Any, first: int) -> list[tuple[int, list[Any]]]:
        """What a step multiplies: the first of four inputs, and levels above zero."""
        places = [builder.add(at, I64(self._size * v)) for v in range(self._vectors)]
        words = [_load(builder, place, self._bytes, self._size) for place in places]
        if self._kind == Q4:
            mask = ir.Constant(self._bytes, [15] * self._size)
            shift = ir.Constant(self._shorts, [4] * (self._size // 2))
            moved = [builder.bitcast(builder.lshr(builder.bitcast(w, self._shorts), shift), self._bytes) for w in words]
            low, high = ([builder.and_(w, mask) for w in half] for half in (words, moved))
            return [(first, low), (BLOCK // 2 + first, high)]
        top = ir.Constant(self._bytes, [-128] * self._size)
        return [(first, [builder.xor(w, top) for w in words])]

    def _repeated(self, builder: Any, four: Any) -> Any:
        """Four bytes again and again."""
        undefined = ir.Constant(self._ints, ir.Undefined)
        return builder.shuffle_vector(
            builder.insert_element(undefined, four, I32(0)), undefined, ir.Constant(self._ints, [0] * (self._size // 4))
        )


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)
