"""The block formats of GGUF that keep their precision when the model runs: Q4_0, Q4_1 and Q8_0.

All three cut a row into blocks of 32 weights and hold for each block small integers ("levels"), a scale and
perhaps a minimum, both in f16: `weight = level * scale + minimum`. A row's blocks follow each other:

    Q4_0   scale f16 | 16 bytes of levels 0..15             minimum = -8 * scale
    Q4_1   scale f16 | minimum f16 | 16 bytes of levels 0..15
    Q8_0   scale f16 | 32 levels -128..127                  minimum = 0

In the 4-bit formats byte i has level i in its low half and level i + 16 in its high half.
Shapes: N rows of K weights in G = K / 32 blocks, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 32
"""Weights in a block."""
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of a block, by the name of the format. These are the formats that can be kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Rows of one matrix, taken apart."""

    levels: torch.Tensor
    """uint8 0..15, or int8 for Q8_0.  # [N, K]"""
    scales: torch.Tensor
    """fp32.  # [N, G]"""
    minimums: torch.Tensor
    """fp32.  # [N, G]"""


def columns(row_bytes: int, kind: str) -> int:
    """How many weights a row of so many bytes has."""
    assert row_bytes % BLOCK_BYTES[kind] == 0, "a row is a whole number of blocks"
    return row_bytes // BLOCK_BYTES[kind] * BLOCK


def take_apart(rows: torch.Tensor, kind: str) -> Blocks:
    """Levels, scales and minimums of stored rows.

    Args:
        rows: the bytes as they stand in the file, uint8.  # [N, B]
        kind: `Q4_0`, `Q4_1` or `Q8_0`.
    """
    levels, scales, minimums = _parts(rows.numpy(), kind)
    return Blocks(
        torch.from_numpy(levels.reshape(len(rows), levels.shape[1] * BLOCK)),
        torch.from_numpy(scales),
        torch.from_numpy(minimums),
    )


def dequantise(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """The weights of stored rows, to the bit what the `gguf` package computes.  # uint8 [N, B] -> fp32 [N, K]"""
    return torch.from_numpy(dequantised(rows.numpy(), kind))


def dequantised(rows: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """The same on arrays, where few rows take a tenth of the time.  # uint8 [N, B] -> fp32 [N, K]"""
    levels, scales, minimums = _parts(rows, kind)
    weights = levels.astype(np.float32)
    weights *= scales[..., None]
    weights += minimums[..., None]
    return weights.reshape(len(rows), weights.shape[1] * BLOCK)


def _parts(rows: NDArray[np.uint8], kind: str) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
    """Levels, scales and minimums.  # [N, G, 32], [N, G], [N, G]"""
    blocks = rows.reshape(len(rows), rows.shape[-1] // BLOCK_BYTES[kind], BLOCK_BYTES[kind])  # [N, G, bytes of a block]
    count = 2 if kind == "Q4_1" else 1
    numbers = np.ascontiguousarray(blocks[..., : 2 * count]).view(np.float16).astype(np.float32)
    scales = np.ascontiguousarray(numbers[..., 0])
    if kind == "Q8_0":
        return np.ascontiguousarray(blocks[..., 2:]).view(np.int8), scales, np.zeros_like(scales)
    minimums = np.ascontiguousarray(numbers[..., 1]) if kind == "Q4_1" else np.float32(-8.0) * scales
    pairs = blocks[..., -BLOCK // 2 :]
    return np.concatenate([pairs & 15, pairs >> 4], axis=-1), scales, minimums
