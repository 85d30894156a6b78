"""Products of rows in 8 bits with tiles of 4 or 8 bits, in whole numbers.

A row's block of 32 inputs is q * d: whole numbers of -127 .. 127 and a scale (`rows.round_row`). The sum of a block's
products is exact whatever instructions make it, so the result is the same on all CPUs that have any of them:

    VNNI    u8 x s8 products of four neighbours added to 32 bits at once
    AVX2    u8 x s8 products of two neighbours in 16 bits. Levels are taken in halves of 4 bits, so that a block's
            eight such sums (at most 8 * 2 * 15 * 127) fit without saturation
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from paceline.model.native.grid import Grid
from paceline.model.native.tiles import BLOCK, KINDS, LEVEL_BYTES, Q4, STEPS, WORD_BYTES, kernel
from paceline.model.native.vectors import F32, FLOATS, I8, I32, I64, INTS, LANES, constant, fma, load, splat

_I16 = ir.IntType(16)


@cache
def integer_instructions() -> str:
    """`vnni512`, `vnni256` or `avx2`, the first that this CPU has; nothing if it has none of them."""
    has = binding.get_host_cpu_features()
    if has.get("avx512vnni") and has.get("avx512bw"):
        return "vnni512"
    if has.get("avxvnni") or (has.get("avx512vnni") and has.get("avx512vl")):
        return "vnni256"
    return "avx2" if has.get("avx2") else ""


def integer_kernel(kind: int, rows: int, tiles: int) -> Any:
    """See `tiles.kernel`; `sums` has the scale of every block of x and the sum of its whole numbers.

    x int8 [rows, K], sums fp32 [rows, blocks, 2]
    """
    which = integer_instructions()
    dots: type[_Maddubs | _Vnni] = _Maddubs if which == "avx2" else _Vnni
    vectors = 1 if which == "vnni512" else 2
    name = f"paceline_integer_product_{which}_{KINDS[kind]}_{rows}x{tiles}"
    return kernel(name, partial(_body, kind=kind, rows=rows, tiles=tiles, dots=dots(kind, vectors)))


def _body(builder: Any, arguments: Any, *, kind: int, rows: int, tiles: int, dots: _Maddubs | _Vnni) -> None:
    grid = Grid(builder, arguments, kind, rows, tiles)
    with cgutils.for_range(builder, grid.blocks) as loop:
        at_levels = builder.mul(loop.index, I64(LEVEL_BYTES[kind]))
        at_x = [builder.add(row, builder.mul(loop.index, I64(BLOCK))) for row in grid.row_x]
        found = {cell: dots.nothing() for cell in grid.cells}
        for which in range(dots.passes):
            for step in range(STEPS[kind]):
                for t in range(tiles):
                    at = builder.add(builder.add(grid.tile_levels[t], at_levels), I64(step * WORD_BYTES))
                    for first, weights in dots.unpack(builder, grid.levels, at, 4 * step, which):
                        for m in range(rows):
                            four = load(builder, grid.x, builder.add(at_x[m], I64(first)), I32, 4)
                            dots.add(builder, found[m, t], weights, four, which)
        for m, t in grid.cells:
            at = builder.add(grid.row_sums[m], builder.mul(loop.index, I64(8)))
            scale = load(builder, grid.sums, at, F32, 4)
            sum_of_q = load(builder, grid.sums, builder.add(at, I64(4)), F32, 4)
            product = builder.sitofp(dots.total(builder, found[m, t]), FLOATS)
            if kind != Q4:  # levels were taken as level + 128, and this takes it back exactly
                product = fma(builder, constant(FLOATS, -128.0), splat(builder, sum_of_q), product)
            product = builder.fmul(product, splat(builder, scale))
            grid.add((m, t), loop.index, product, builder.fmul(scale, sum_of_q))
    grid.deliver()


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _repeated(builder: Any, four: Any, count: int) -> Any:
    """Four bytes again and again.  # i32 -> i32 x count"""
    kind = ir.VectorType(I32, count)
    undefined = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, four, I32(0)), undefined, ir.Constant(kind, [0] * count)
    )


class _Dots:
    """Sums of products of levels with four inputs at a time, for one row and one tile.

    Args:
        kind: of the tiles.
        vectors: how many of the CPU's hold four levels of 16 outputs.
    """

    def __init__(self, kind: int, vectors: int) -> None:
        self.kind, self.vectors = kind, vectors
        self.size = WORD_BYTES // vectors
        self.passes = 1
        self.bytes_, self.shorts, self.ints = (
            ir.VectorType(t, self.size // size) for t, size in ((I8, 1), (_I16, 2), (I32, 4))
        )

    def loaded(self, builder: Any, levels: Any, at: Any) -> list[Any]:
        """The bytes of one step, in vectors."""
        places = [builder.add(at, I64(self.size * v)) for v in range(self.vectors)]
        return [load(builder, levels, place, self.bytes_, self.size) for place in places]

    def halves(self, builder: Any, vectors: list[Any]) -> tuple[list[Any], list[Any]]:
        """The lower and the upper 4 bits of every byte."""
        mask = ir.Constant(self.bytes_, [15] * self.size)
        shift = ir.Constant(self.shorts, [4] * (self.size // 2))
        moved = [builder.bitcast(builder.lshr(builder.bitcast(v, self.shorts), shift), self.bytes_) for v in vectors]
        return [builder.and_(v, mask) for v in vectors], [builder.and_(v, mask) for v in moved]

    def joined(self, builder: Any, vectors: list[Any]) -> Any:
        """32-bit sums of all 16 outputs in one vector."""
        if len(vectors) == 1:
            return vectors[0]
        return builder.shuffle_vector(*vectors, ir.Constant(INTS, list(range(LANES))))


class _Vnni(_Dots):
    """With `vpdpbusd`."""

    def nothing(self) -> list[Any]:
        """Sums before anything was added."""
        return [ir.Constant(self.ints, [0] * (self.size // 4)) for _ in range(self.vectors)]

    def unpack(self, builder: Any, levels: Any, at: Any, first: int, which: int) -> list[tuple[int, list[Any]]]:  # noqa: ARG002
        """What a step multiplies: the first of four inputs, and levels above zero."""
        vectors = self.loaded(builder, levels, at)
        if self.kind == Q4:
            low, high = self.halves(builder, vectors)
            return [(first, low), (BLOCK // 2 + first, high)]
        top = ir.Constant(self.bytes_, [-128] * self.size)
        return [(first, [builder.xor(v, top) for v in vectors])]

    def add(self, builder: Any, sums: list[Any], weights: list[Any], four: Any, which: int) -> None:  # noqa: ARG002
        """Add products with four inputs."""
        inputs = _repeated(builder, four, self.size // 4)
        name = f"llvm.x86.avx512.vpdpbusd.{8 * self.size}"
        for v in range(self.vectors):
            levels = builder.bitcast(weights[v], self.ints)
            sums[v] = _call(builder, name, self.ints, [sums[v], levels, inputs])

    def total(self, builder: Any, sums: list[Any]) -> Any:
        """32-bit sums of all outputs."""
        return self.joined(builder, sums)


class _Maddubs(_Dots):
    """With `vpmaddubsw`: the upper halves of 8-bit levels have sums of their own."""

    def __init__(self, kind: int, vectors: int) -> None:
        super().__init__(kind, vectors)
        self.passes = 1 if kind == Q4 else 2

    def nothing(self) -> list[Any]:
        """Sums before anything was added."""
        count = self.vectors * (1 if self.kind == Q4 else 2)
        return [ir.Constant(self.shorts, [0] * (self.size // 2)) for _ in range(count)]

    def unpack(self, builder: Any, levels: Any, at: Any, first: int, which: int) -> list[tuple[int, list[Any]]]:
        """What a step multiplies in a pass: the first of four inputs, and halves of levels above zero."""
        vectors = self.loaded(builder, levels, at)
        if self.kind == Q4:
            low, high = self.halves(builder, vectors)
            return [(first, low), (BLOCK // 2 + first, high)]
        top = ir.Constant(self.bytes_, [-128] * self.size)
        if which == 0:
            return [(first, self.halves(builder, vectors)[0])]
        return [(first, self.halves(builder, [builder.xor(v, top) for v in vectors])[1])]

    def add(self, builder: Any, sums: list[Any], weights: list[Any], four: Any, which: int) -> None:
        """Add products with four inputs."""
        inputs = builder.bitcast(_repeated(builder, four, self.size // 4), self.bytes_)
        for v, levels in enumerate(weights):
            found = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", self.shorts, [levels, inputs])
            place = which * self.vectors + v
            sums[place] = builder.add(sums[place], found)

    def total(self, builder: Any, sums: list[Any]) -> Any:
        """32-bit sums of all outputs."""
        ones = ir.Constant(self.shorts, [1] * (self.size // 2))
        wide = [_call(builder, "llvm.x86.avx2.pmadd.wd", self.ints, [s, ones]) for s in sums]
        if self.kind != Q4:
            sixteen = ir.Constant(self.ints, [4] * (self.size // 4))
            low, high = wide[: self.vectors], wide[self.vectors :]
            wide = [builder.add(a, builder.shl(b, sixteen)) for a, b in zip(low, high, strict=True)]
        return self.joined(builder, wide)
