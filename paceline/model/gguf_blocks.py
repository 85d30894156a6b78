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

import torch

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
    blocks = rows.reshape(len(rows), rows.shape[-1] // BLOCK_BYTES[kind], BLOCK_BYTES[kind])  # [N, G, bytes of a block]
    scales = _halves(blocks[..., :2])
    if kind == "Q8_0":
        levels = blocks[..., 2:].contiguous().view(torch.int8)
        return Blocks(levels.flatten(1), scales, torch.zeros_like(scales))
    minimums = _halves(blocks[..., 2:4]) if kind == "Q4_1" else -8.0 * scales
    pairs = blocks[..., -BLOCK // 2 :]
    return Blocks(torch.cat([pairs & 15, pairs >> 4], dim=-1).flatten(1), scales, minimums)


def dequantise(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """The weights of stored rows, to the bit what the `gguf` package computes.  # uint8 [N, B] -> fp32 [N, K]"""
    blocks = take_apart(rows, kind)
    levels = blocks.levels.reshape(*blocks.scales.shape, BLOCK).float()
    return (levels * blocks.scales[..., None] + blocks.minimums[..., None]).flatten(1)


def _halves(raw: torch.Tensor) -> torch.Tensor:
    """Two bytes each as the f16 number they are.  # uint8 [N, G, 2] -> fp32 [N, G]"""
    return raw.contiguous().view(torch.float16)[..., 0].float()
