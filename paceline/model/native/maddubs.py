"""Products of 8-bit rows with a block of a tile by AVX2's `vpmaddubsw`: u8 x s8 products of two neighbours in 16 bits.

Levels are taken in halves of 4 bits, so that a block's eight such sums (at most 8 * 2 * 15 * 127) fit without
saturation; the upper halves of 8-bit levels have sums of their own.

Written as assembly, in the order in which 16 registers hold it all: four rows' sums (8), a step's weights (4), two
products and a mask. LLVM would compute one half of the outputs after the other and keep every row's inputs on the
stack meanwhile, which takes twice as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from paceline.model.native.tiles import BLOCK, Q4, STEPS, WORD_BYTES
from paceline.model.native.vectors import I64, INTS, LANES

binding.initialize_native_asmparser()
_VECTORS = 2
"""That hold four levels of 16 outputs."""
_SIZE = WORD_BYTES // _VECTORS
_BYTES, _SHORTS, _EIGHT = (ir.VectorType(ir.IntType(8 * size), _SIZE // size) for size in (1, 2, 4))
_LOW, _HIGH = "low", "high"
_TOP = 128


class Maddubs:
    """The instructions.

    Args:
        kind: of the tiles.
    """

    def __init__(self, kind: int) -> None:
        self._kind = kind

    def products(self, builder: Any, levels: Any, at_x: Sequence[Any]) -> list[Any]:
        """See `integer_kernel.Products`."""
        if self._kind == Q4:
            return [joined(builder, sums) for sums in self._pass(builder, levels, at_x, (_LOW, _HIGH))]
        low, high = (self._pass(builder, levels, at_x, (half,)) for half in (_LOW, _HIGH))
        sixteen = ir.Constant(_EIGHT, [4] * (_SIZE // 4))
        both = zip(low, high, strict=True)
        return [
            joined(builder, [builder.add(a, builder.shl(b, sixteen)) for a, b in zip(*pair, strict=True)])
            for pair in both
        ]

    def _pass(self, builder: Any, levels: Any, at_x: Sequence[Any], halves: Sequence[str]) -> list[list[Any]]:
        """Every row's sums over the halves of a block's levels."""
        nothing = ir.Constant(_SHORTS, [0] * (_SIZE // 2))
        sums = [[nothing] * _VECTORS for _ in at_x]
        for step in range(STEPS[self._kind]):
            weights = self._unpack(builder, levels, step * WORD_BYTES, halves)
            for m, x in enumerate(at_x):
                sums[m] = _add(builder, sums[m], weights, x, 4 * step)
        wide = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_EIGHT, [_SHORTS] * 2), "llvm.x86.avx2.pmadd.wd"
        )
        ones = ir.Constant(_SHORTS, [1] * (_SIZE // 2))
        return [[builder.call(wide, [s, ones]) for s in row] for row in sums]

    def _unpack(self, builder: Any, levels: Any, offset: int, halves: Sequence[str]) -> list[Any]:
        """A step's levels above zero: both vectors' of each half."""
        lines: list[str] = []
        outputs = len(halves) * _VECTORS
        mask, top = f"${outputs + 1}", f"${outputs + 2}"
        for v in range(_VECTORS):
            own = [f"${h * _VECTORS + v}" for h in range(len(halves))]
            lines.append(f"vmovdqu {offset + v * _SIZE}(${outputs}), {own[0]}")
            if halves == (_HIGH,):
                lines.append(f"vpxor {top}, {own[0]}, {own[0]}")
            if halves[-1] == _HIGH:
                lines.append(f"vpsrlw $$4, {own[0]}, {own[-1]}")
            lines += [f"vpand {mask}, {name}, {name}" for name in own]
        constants = [ir.Constant(_BYTES, [15] * _SIZE)]
        if halves == (_HIGH,):
            constants.append(ir.Constant(_BYTES, [-_TOP] * _SIZE))
        return _assembly(builder, lines, _BYTES, outputs, [levels, *constants])


def _add(builder: Any, sums: Sequence[Any], weights: Sequence[Any], x: Any, first: int) -> list[Any]:
    """A row's sums, and its products with the weights of a step, which begins at input `first`."""
    lines = []
    for half in range(len(weights) // _VECTORS):
        own = [f"${7 + half * _VECTORS + v}" for v in range(_VECTORS)]
        lines += [
            f"vpbroadcastd {first + half * BLOCK // 2}($6), $2",
            f"vpmaddubsw $2, {own[0]}, $3",
            f"vpmaddubsw $2, {own[1]}, $2",
            "vpaddw $3, $0, $0",
            "vpaddw $2, $1, $1",
        ]
    return _assembly(builder, lines, _SHORTS, 4, [*sums, x, *weights], tied=_VECTORS)[:_VECTORS]


def _assembly(
    builder: Any, lines: Sequence[str], kind: Any, outputs: int, inputs: Sequence[Any], tied: int = 0
) -> list[Any]:
    """Instructions that LLVM leaves in their order; `$0` .. are outputs of one kind, then inputs.

    The first `tied` inputs are in the registers of the first outputs.
    """
    result = ir.LiteralStructType([kind] * outputs)
    rest = ["r" if value.type == I64 else "x" for value in inputs[tied:]]
    places = [*["=&x"] * outputs, *map(str, range(tied)), *rest]
    function = ir.FunctionType(result, [value.type for value in inputs])
    found = builder.asm(function, "\n".join(lines), ",".join(places), inputs, side_effect=True)
    return [builder.extract_value(found, i) for i in range(outputs)]


def joined(builder: Any, vectors: Sequence[Any]) -> Any:
    """32-bit sums of all 16 outputs in one vector."""
    if len(vectors) == 1:
        return vectors[0]
    return builder.shuffle_vector(*vectors, ir.Constant(INTS, list(range(LANES))))
