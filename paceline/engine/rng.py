"""Counter-based noise: the same integers for the same place, in whatever order they are asked for.

A place is (request seed, sample index, absolute token position, stream); token id t reads word t of that place. The
generator is Philox4x64-10 (Salmon et al., SC 2011), which NumPy runs in C; `philox_words_torch` is the same function
in plain tensor operations and gives the same integers on any device.

Because noise belongs to a position and not to a step, a text is the same however its tokens were batched, drafted or
resubmitted: 64 tokens equal 32 tokens plus a second request that continues them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

WORDS_PER_BLOCK = 8  # four 64-bit outputs, each split into its low and high half


class Stream(IntEnum):
    """Independent streams at one position."""

    TARGET = 0
    """The target's own draw. Under `coupled` stochastic drafters use it too."""
    ACCEPT = 1
    """The accept-or-reject uniforms of the rules that weigh draft laws, one per sibling."""
    RESIDUAL = 2
    """Their recovered token."""
    DRAFT = 3
    """The drafter's own draw where it must be independent of the target's; fresh in every round, since what is left
    of an earlier round (rows that Token Recycling learned from rejected nodes) may decide who drafts next."""


def fresh_seed() -> int:
    """A 63-bit seed from the operating system (63, so that JSON readers with signed integers keep it)."""
    return secrets.randbits(63)


class Repeats:
    """Counts how often seeds came, in bounded memory: a seed that falls into the counter of another begins higher."""

    _COUNTERS = 1 << 16

    def __init__(self) -> None:
        self._counts = np.zeros(self._COUNTERS, dtype=np.int64)

    def count(self, seed: int, sample_index: int) -> int:
        """A number that no earlier request with this seed and sample index got."""
        place = int(_digest(seed, sample_index)) % self._COUNTERS
        self._counts[place] += 1
        return int(self._counts[place]) - 1


def secret_seed(seed: int, repeat: int, prompt: Sequence[int], prediction: Sequence[int]) -> int:
    """The key of noise that nothing a drafter may know depends on.

    What the same seed gave before may be remembered from an earlier request, or stand in the prompt or prediction.
    """
    return _digest(seed, repeat, len(prompt), *prompt, *prediction)


def _digest(*numbers: int) -> int:
    data = np.array(numbers, dtype=np.uint64).astype("<u8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one sample of one request."""

    seed: int
    sample_index: int = 0

    def words(self, position: int, stream: Stream, count: int, round_id: int = 0) -> NDArray[np.uint32]:
        """Uniform 32-bit integers for token ids 0..count-1 at `position`.  # [count]

        `round_id` tells apart draws that are repeated at one position (a redraft after a rejection).
        """
        generator = np.random.Philox(
            key=np.array([self.seed, self.sample_index], dtype=np.uint64),
            counter=np.array([0, position, stream, round_id], dtype=np.uint64),
        )
        halves = np.asarray(generator.random_raw((count + 1) // 2), dtype="<u8").view("<u4")
        words: NDArray[np.uint32] = halves[:count]
        return words

    def uniform(self, position: int, stream: Stream, number: int = 0) -> float:
        """One uniform in the open interval (0, 1); `number` tells apart several of one place."""
        return float(uniforms(self.words(position, stream, number + 1))[number])


def uniforms(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """(k + 0.5) / 2^32: never 0 and never 1.  # same shape"""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_LOW32 = 0xFFFFFFFF


def philox_words_torch(
    noise: Noise,
    position: int,
    stream: Stream,
    count: int,
    device: torch.device | str = "cpu",
    round_id: int = 0,
) -> torch.Tensor:
    """`Noise.words` in tensor operations: int64 values in [0, 2^32) on `device`.  # [count]

    NumPy steps the counter before its first block, so block b is generated from counter b + 1.
    """
    blocks = torch.arange(1, -(-count // WORDS_PER_BLOCK) + 1, dtype=torch.int64, device=device)
    c0, c2 = blocks, torch.full_like(blocks, int(stream))
    c1, c3 = torch.full_like(blocks, position), torch.full_like(blocks, round_id)
    k0, k1 = noise.seed, noise.sample_index
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_wide(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_wide(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    words = [half for c in (c0, c1, c2, c3) for half in (c & _LOW32, (c >> 32) & _LOW32)]
    return torch.stack(words, dim=-1).flatten()[:count]


def _signed(value: int) -> int:
    """The low 64 bits as a signed integer, which is what int64 tensors hold."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _multiply_wide(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 64 bits of the unsigned product, from 32-bit limbs (int64 tensors wrap)."""
    x0, x1 = x & _LOW32, (x >> 32) & _LOW32
    m0, m1 = factor & _LOW32, factor >> 32
    cross = x1 * m0 + (((x0 * m0) >> 32) & _LOW32)
    middle = x0 * m1 + (cross & _LOW32)
    high = x1 * m1 + ((cross >> 32) & _LOW32) + ((middle >> 32) & _LOW32)
    return high, x * _signed(factor)
