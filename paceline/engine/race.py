"""The draw of `Law.draw` over a whole vocabulary in one pass of native code, without arrays in between.

A token finishes at E / w, E = -log u and w = exp(logit - max), and the first one is drawn. E >= 1 - u >= 2^-33, so one
whose weight times the likeliest token's finish is less than that cannot win whatever its noise is. Eight such tokens in
a row (a block of Philox4x64-10) get none; for the rest, a bound on w that costs two operations says who is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from paceline.compiled import compiled
from paceline.engine.rng import WORDS_PER_BLOCK, Noise, Stream

_F32 = ir.FloatType()
_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_SLACK = 1.0001
"""For the rounding of fp32."""
_LEAST = 33.0 * float(np.log(2.0))
"""No finish is earlier than e^-_LEAST over the weight."""
_LOG2_E = np.float32(1.4426950408889634)


def race(logits: NDArray[np.float32], noise: Noise, position: int, stream: Stream) -> int:
    """The token that `Law(logits).draw(noise.words(position, stream, len(logits)))` draws.  # logits [vocab]"""
    place = np.array([noise.seed, noise.sample_index, position, stream], dtype=np.uint64)
    return int(_race(logits, place))


@intrinsic
def _wide(typing_context: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """High and low half of the product of two uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        double = ir.IntType(128)
        product = builder.mul(*[builder.zext(a, double) for a in arguments])
        high = builder.trunc(builder.lshr(product, double(64)), ir.IntType(64))
        return context.make_tuple(builder, signature.return_type, [high, builder.trunc(product, ir.IntType(64))])

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), generate  # type: ignore[attr-defined]


@intrinsic
def _not_below_exp2(typing_context: Any, x: Any) -> Any:  # noqa: ARG001
    """A number that is 2^x or up to 6.2% more, for x from -126 to 0: its bits are a line between powers of two."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        bits = builder.fmul(builder.fadd(arguments[0], _F32(127.0)), _F32(float(1 << 23)))
        return builder.bitcast(builder.fptosi(bits, ir.IntType(32)), _F32)

    return types.float32(types.float32), generate


@njit(nogil=True, error_model="numpy")
def _philox(block: int, place: np.ndarray, out: np.ndarray) -> None:
    """Words of a block.  # place [seed, sample, position, stream], out uint32 [8]"""
    c0, c1, c2, c3 = np.uint64(block + 1), place[2], place[3], np.uint64(0)
    k0, k1 = place[0], place[1]
    for _ in range(10):
        high0, low0 = _wide(c0, _M0)
        high1, low1 = _wide(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    out[0], out[2], out[4], out[6] = np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)
    half = np.uint64(32)
    out[1], out[3] = np.uint32(c0 >> half), np.uint32(c1 >> half)
    out[5], out[7] = np.uint32(c2 >> half), np.uint32(c3 >> half)


@njit(nogil=True, error_model="numpy")
def _finish(word: int, below: float) -> float:
    """When a token finishes whose logit is so far from the likeliest."""
    return -np.log((np.float64(word) + 0.5) * 2.0**-32) / np.exp(below)


@compiled()
def _race(logits: np.ndarray, place: np.ndarray) -> int:
    words = np.empty(WORDS_PER_BLOCK, np.uint32)
    count = logits.shape[0]
    peak = logits[0]
    for i in range(count):
        peak = max(peak, logits[i])
    best = 0
    while logits[best] != peak:
        best += 1
    _philox(best // WORDS_PER_BLOCK, place, words)
    first = _finish(words[best % WORDS_PER_BLOCK], 0.0)
    bound, winner = np.float32(first * _SLACK), best
    lowest = peak - np.float32(np.log(first * _SLACK) + _LEAST + 0.01)
    for block in range((count + WORDS_PER_BLOCK - 1) // WORDS_PER_BLOCK):
        start, stop = block * WORDS_PER_BLOCK, min((block + 1) * WORDS_PER_BLOCK, count)
        highest = logits[start]
        for i in range(start + 1, stop):
            highest = max(highest, logits[i])
        if highest < lowest:
            continue
        _philox(block, place, words)
        for i in range(start, stop):
            below = logits[i] - peak
            left = (np.float32(~words[i - start]) + np.float32(0.5)) * np.float32(2.0**-32)
            if logits[i] >= lowest and left <= _not_below_exp2(max(below * _LOG2_E, np.float32(-126.0))) * bound:
                finish = _finish(words[i - start], np.float64(logits[i]) - np.float64(peak))
                if finish < first or (finish == first and i < winner):
                    first, winner = finish, i
    return winner
