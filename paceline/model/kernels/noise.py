"""The noise of `engine.rng` inside kernels: Philox4x64-10, the same integers for the same place.

A place is (seed, sample index, position, stream, round), and token id t reads word t of it: 32 bits of block t // 8.
Seeds are any 64 bits, passed as int64 with the same bits. One thread makes a block, so its eight tokens' words lie in
its own registers, next to eight logits that one 128-bit load brings (bf16).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from paceline.engine.rng import WORDS_PER_BLOCK, Noise


@triton.jit
def philox(
    block: tl.tensor, position: tl.tensor, stream: tl.tensor, round_id: tl.tensor, key0: tl.tensor, key1: tl.tensor
) -> Any:
    """The four 64-bit outputs of `block`.  # uint64 [...] each, shaped like block; all arguments uint64"""
    c0 = block + tl.full((), 1, tl.uint64)  # NumPy steps the counter before its first block
    c1 = tl.zeros_like(c0) + position
    c2 = tl.zeros_like(c0) + stream
    c3 = tl.zeros_like(c0) + round_id
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full((), 0xD2E7470EE14C6C93, tl.uint64))
        low0 = c0 * tl.full((), 0xD2E7470EE14C6C93, tl.uint64)
        high1 = tl.umulhi(c2, tl.full((), 0xCA5A826395121157, tl.uint64))
        low1 = c2 * tl.full((), 0xCA5A826395121157, tl.uint64)
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = key0 + tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        key1 = key1 + tl.full((), 0xBB67AE8584CAA73B, tl.uint64)
    return c0, c1, c2, c3


@triton.jit
def low_half(c: tl.tensor) -> Any:
    """Even words of a block.  # uint32, shaped like c"""
    return (c & tl.full((), 0xFFFFFFFF, tl.uint64)).to(tl.uint32)


@triton.jit
def high_half(c: tl.tensor) -> Any:
    """Odd words of a block.  # uint32, shaped like c"""
    return (c >> tl.full((), 32, tl.uint64)).to(tl.uint32)


@triton.jit
def noise_tile(
    start: tl.tensor,
    position: tl.tensor,
    stream: tl.tensor,
    round_id: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    TILE: tl.constexpr,
) -> Any:
    """Words of the tokens start .. start + TILE; start is a multiple of 8.  # uint32 [TILE]"""
    blocks = start // 8 + tl.arange(0, TILE // 8)
    c0, c1, c2, c3 = philox(blocks.to(tl.uint64), position, stream, round_id, key0, key1)
    # `join` adds a last axis, so the one that runs fastest (low or high half) is joined last.
    low = tl.join(tl.join(low_half(c0), low_half(c2)), tl.join(low_half(c1), low_half(c3)))
    high = tl.join(tl.join(high_half(c0), high_half(c2)), tl.join(high_half(c1), high_half(c3)))
    return tl.reshape(tl.join(low, high), (TILE,))


@triton.jit
def noise_word(
    token: tl.tensor, position: tl.tensor, stream: tl.tensor, round_id: tl.tensor, key0: tl.tensor, key1: tl.tensor
) -> Any:
    """The word of one token.  # uint32, a scalar"""
    c0, c1, c2, c3 = philox((token // 8).to(tl.uint64), position, stream, round_id, key0, key1)
    pair = (token % 8) // 2
    c = tl.where(pair < 2, tl.where(pair == 0, c0, c1), tl.where(pair == 2, c2, c3))
    return tl.where(token % 2 == 0, low_half(c), high_half(c))


@triton.jit
def uniform(word: tl.tensor) -> Any:
    """(k + 0.5) / 2^32, as `engine.rng.uniforms` has it.  # fp64, shaped like word"""
    return (word.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10


@triton.jit
def _words_kernel(out_ptr: tl.tensor, places_ptr: tl.tensor, count: tl.tensor, TILE: tl.constexpr) -> None:
    start = tl.program_id(0) * TILE
    seed = tl.load(places_ptr).to(tl.uint64, bitcast=True)
    sample = tl.load(places_ptr + 1).to(tl.uint64, bitcast=True)
    position = tl.load(places_ptr + 2).to(tl.uint64, bitcast=True)
    stream = tl.load(places_ptr + 3).to(tl.uint64, bitcast=True)
    round_id = tl.load(places_ptr + 4).to(tl.uint64, bitcast=True)
    words = noise_tile(start, position, stream, round_id, seed, sample, TILE)
    ids = start + tl.arange(0, TILE)
    tl.store(out_ptr + ids, words.to(tl.int64), mask=ids < count)


def philox_words(
    noise: Noise, position: int, stream: int, count: int, device: torch.device, round_id: int = 0
) -> torch.Tensor:
    """`Noise.words` made by the kernels: int64 values in [0, 2^32).  # [count]"""
    place = [noise.seed, noise.sample_index, position, int(stream), round_id]
    places = torch.tensor([as_int64(number) for number in place], dtype=torch.int64, device=device)
    out = torch.empty(count, dtype=torch.int64, device=device)
    tile = 128 * WORDS_PER_BLOCK
    _words_kernel[(triton.cdiv(count, tile),)](out, places, count, TILE=tile)
    return out


def as_int64(number: int) -> int:
    """The signed number with the same 64 bits, which is how seeds reach the device."""
    return number - 2**64 if number >= 2**63 else number
