"""Linear layers whose weights lie in tiles for `native/matmul.py`: the bytes of a GGUF file as they are, bf16, or fp32.

A layer takes fp32 inputs as they are, and gives what its dequantised weight gives, to fp32 rounding; or, over the
blocks of a file, it rounds them to 8 bits with a scale for every 32, as llama.cpp does, and multiplies whole numbers.
A row's result does not depend on the other rows of the call, nor on threads, to the last bit.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.cache.pages import Arena
from paceline.model.gguf_blocks import BLOCK, Blocks

LANES = 16
"""Outputs of a tile; a layer with others is filled up with zeros."""
_WEIGHTS = Arena()


class TiledLinear(nn.Module):
    """A linear layer over tiles.

    The weight is not a parameter: it is absent from `state_dict()`, does not follow `.to()` and takes no gradient.

    Args:
        kind: of the tiles, see `native/matmul.py`.
        levels: the tiles, aligned.  # [tiles, G, ...]
        numbers: their scales and minimums, if the kind has them.  # f16 [tiles, G, ...]
        out_features: N, without what was filled up.
        bias: added to the product, if given.  # [N]
        dtype: of inputs and outputs.
        rounds_inputs: whether inputs are rounded to 8 bits first.
    """

    def __init__(
        self,
        kind: str,
        levels: torch.Tensor,
        numbers: torch.Tensor | None,
        out_features: int,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        rounds_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.dtype, self.rounds_inputs = kind, dtype, rounds_inputs
        self.tiles, self.blocks = int(levels.shape[0]), int(levels.shape[1])
        self.in_features, self.out_features = self.blocks * BLOCK, out_features
        self.levels, self.numbers = _WEIGHTS.copy(levels), None if numbers is None else _WEIGHTS.copy(numbers)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight with its scales."""
        return self.levels.nbytes + (0 if self.numbers is None else self.numbers.nbytes)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in `dtype`: a copy, for code that looks at it.  # [N, K]"""
        return self.dequantise().to(self.dtype)

    def dequantise(self) -> torch.Tensor:
        """The weight that the layer multiplies with, exactly.  # fp32 [N, K]"""
        levels = self.levels  # [T, G, 4 or 8, lanes, 4] or [T, G, 32, lanes]
        if self.kind == "Q4":
            levels = torch.cat([levels & 15, levels >> 4], dim=2)
        if self.numbers is not None:
            levels = levels.transpose(3, 4).reshape(self.tiles, self.blocks, BLOCK, LANES)
        weight = levels.float()
        if self.numbers is not None:
            numbers = self.numbers.float()  # [T, G, 2 or 1, lanes]
            weight = weight * numbers[:, :, :1]
            if self.kind == "Q4":
                weight = weight + numbers[:, :, 1:]
        rows = weight.permute(0, 3, 1, 2).reshape(self.tiles * LANES, self.in_features)
        return rows[: self.out_features].contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., K]` to `[..., N]`."""
        from paceline.model.native.linear import multiply

        out = multiply(self, x.reshape(-1, self.in_features).float()).to(x.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        inputs = ", inputs in 8 bits" if self.rounds_inputs else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}{inputs}"


def tile_blocks(
    blocks: Blocks, bias: torch.Tensor | None, dtype: torch.dtype, *, rounds_inputs: bool = False
) -> TiledLinear:
    """A layer over a GGUF matrix: the same levels, scales and minimums.

    Args:
        blocks: read, not kept.
        bias: see `TiledLinear`.
        dtype: see `TiledLinear`.
        rounds_inputs: see `TiledLinear`.
    """
    rows, kind = len(blocks.levels), "Q8" if blocks.levels.dtype is torch.int8 else "Q4"
    levels = _lanes_last(blocks.levels, BLOCK)  # [T, G, 32, lanes]
    levels = levels.reshape(*levels.shape[:2], BLOCK // 4, 4, LANES).transpose(3, 4)  # [T, G, 8, lanes, 4]
    numbers = _halves(blocks.scales)
    if kind == "Q4":
        levels = levels[:, :, :4] | (levels[:, :, 4:] << 4)
        numbers = torch.cat([numbers, _halves(blocks.minimums)], dim=2)
    return TiledLinear(kind, levels, numbers, rows, bias, dtype, rounds_inputs=rounds_inputs)


def tile_weight(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> TiledLinear:
    """A layer over a matrix in bf16 or fp32, whose inputs are a multiple of 32.

    Args:
        weight: read, not kept.  # [N, K]
        bias: see `TiledLinear`.
        dtype: see `TiledLinear`.
    """
    kind = "BF16" if weight.dtype is torch.bfloat16 else "F32"
    return TiledLinear(kind, _lanes_last(weight.detach(), BLOCK), None, len(weight), bias, dtype)


def tile_linears(model: nn.Module) -> None:
    """Replace, in place, every plain `nn.Linear` by a `TiledLinear`, in bf16 where that loses nothing.

    A layer that the tiles cannot hold (its inputs are no multiple of 32) stays what it is.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.in_features % BLOCK == 0:
                weight, half = child.weight.detach(), child.weight.detach().to(torch.bfloat16)
                exact = half if torch.equal(half.to(weight.dtype), weight) else weight
                setattr(parent, name, tile_weight(exact, child.bias, child.weight.dtype))


def _lanes_last(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """Rows in groups of 16, side by side.  # [N, G * width] -> [T, G, width, 16]"""
    missing = -len(matrix) % LANES
    filled = nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix
    return filled.reshape(len(filled) // LANES, LANES, -1, width).permute(0, 2, 3, 1)


def _halves(numbers: torch.Tensor) -> torch.Tensor:
    """As they stand in the file.  # fp32 [N, G] -> f16 [T, G, 1, 16]"""
    return _lanes_last(numbers, 1).to(torch.float16)
