"""Linear layers over 4-bit and 8-bit weights, through the weight-only operators that PyTorch has for CPUs.

They read a weight of 4 or 8 bits instead of 16 or 32 and compute in fp32 with bf16 inputs and outputs. (With fp32 or
fp16 inputs the operators are plain loops, 6 to 40 times slower, so other inputs are rounded to bf16 first.) One call,
one core of an AMD EPYC with AVX2 and without bf16 instructions, torch 2.13, median of 25 (of 9 for the head) in turns
on a machine with other work, in microseconds; compare within a column:

    inputs x outputs       576 x 576           576 x 1536          1536 x 576         576 x 49152
    rows               1    4   16   64     1    4   16   64     1    4   16   64     1     4    16     64
    fp32 packed      220  111  225  675   385  258  617 1944   221  263  797 2046  12.0k 14.5k 28.5k  84.6k
    bf16 F.linear    162  600 1261 5167   408 1680 3421  21k   368  710 2745  15k   8.5k 35.9k  140k   621k
    int8              70  118  407 1562   144  286 1039 4140   145  271  963 3698   7.4k 12.2k 49.9k   232k
    int4             136  139  478 1828   168  331 1204 4857   181  328 1145 4489   6.3k 10.3k 37.1k   174k

One pass through the linear layers of SmolLM2-135M in Q4_1 with its head in int8, weights out of the cache, in ms:

    rows               1      2      4      8     16     32     64
    fp32 packed     86.1   81.3   98.2  124.2  197.7  296.8  459.9
    bf16 F.linear   52.6   95.0  189.9  395.3   1018
    int4 and int8   49.6   47.4   71.0  186.7  359.7  546.6   1084

So decode and short verify steps gain, and from about 6 rows on a CPU like this the arithmetic of unpacking weights for
every 4 rows costs more than reading fp32 ones. All rows take the same operator all the same, because of what follows.

A row's result does not depend on the other rows of the call, to the last bit (seen for 1 to 64 rows, with 1 and 2
threads, under AVX2): both operators sum over the inputs in one order, and never split that sum.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.model.gguf_blocks import BLOCK, Blocks

_MULTIPLE = 16
"""The int4 operator takes output features in multiples of this; a layer with others is filled up with zeros."""
_TILE = 64
"""Output features that the int4 operator packs together, on CPUs with AVX512; 32 on others."""
_ALIGNMENT = 64
"""Bytes: the int8 operator loads whole vectors of its input from aligned addresses, unchecked."""
_CHUNK = 1 << 20
"""Weights that are worked on at a time while a layer is built: the operator wants them as int32."""


class QuantizedLinear(nn.Module):
    """What both kinds of layer share: features, bias, types and shapes of input and output.

    The weight is not a parameter: it is absent from `state_dict()`, does not follow `.to()` and takes no gradient.

    Args:
        in_features: K.
        out_features: N.
        bias: added to the product, if given.  # [N]
        dtype: of inputs and outputs, of the bias, and of `weight`.
    """

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer multiplies with, in `dtype`: a copy, for code that looks at it.  # [N, K]"""
        return self.dequantise().to(self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight with its scales."""
        raise NotImplementedError

    def dequantise(self) -> torch.Tensor:
        """The weight that the layer multiplies with, exactly.  # fp32 [N, K]"""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., K]` to `[..., N]`; x and the result are rounded to bf16, sums are in fp32."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        out = self._multiply(rows.contiguous()).to(x.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """The product of contiguous rows.  # bf16 [M, K] -> bf16 [M, N]"""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int4Linear(QuantizedLinear):
    """Levels 0..15 with a scale and a minimum for every 32 inputs: GGUF's Q4_0 and Q4_1 as they are.

    The operator computes `(level - 8) * scale + zero`, so `zero = minimum + 8 * scale`. It takes scale and zero in
    bf16, which is all that is rounded: a weight is off by at most `2^-8 * (8 * |scale| + |zero|)`.

    Args:
        blocks: of a 4-bit format; read, not kept.
        bias: see `QuantizedLinear`.
        dtype: see `QuantizedLinear`.
    """

    def __init__(self, blocks: Blocks, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        assert blocks.levels.dtype is torch.uint8, "levels of 4 bits"
        super().__init__(int(blocks.levels.shape[1]), int(blocks.levels.shape[0]), bias, dtype)
        zeros = blocks.minimums + 8.0 * blocks.scales
        numbers = torch.stack([blocks.scales, zeros], dim=-1).transpose(0, 1)  # [G, N, 2]
        missing = -self.out_features % _MULTIPLE
        self._scales = nn.functional.pad(numbers, (0, 0, 0, missing)).to(torch.bfloat16).contiguous()
        self._packed = _pack(nn.functional.pad(blocks.levels, (0, 0, 0, missing)))

    @property
    def num_bytes(self) -> int:
        """See `QuantizedLinear`."""
        return self._packed.nbytes + self._scales.nbytes

    def dequantise(self) -> torch.Tensor:
        """The weight that the layer multiplies with, exactly; takes as long as K rows of input.  # fp32 [N, K]"""
        # How levels are packed depends on the CPU. Its own product with the identity gives them back, for a scale
        # of one and a zero of eight: integers up to 15, exact in bf16.
        ones = torch.empty_like(self._scales)
        ones[..., 0], ones[..., 1] = 1.0, 8.0
        identity = torch.eye(self.in_features, dtype=torch.bfloat16)
        levels = torch.cat(
            [_int4(rows, self._packed, ones) for rows in torch.split(identity, 256)]
        ).t()  # [N + missing, K]
        scales, zeros = self._scales.float().transpose(0, 1)[..., None].unbind(-2)  # [N + missing, G, 1] each
        weight = (levels.float().reshape(len(levels), -1, BLOCK) - 8.0) * scales + zeros
        return weight.flatten(1)[: self.out_features]

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return _int4(rows, self._packed, self._scales)[:, : self.out_features]


class Int8Linear(QuantizedLinear):
    """Levels -127..127 with one scale for a whole row of the weight.

    Args:
        levels: int8, K a multiple of 32; kept as it is.  # [N, K]
        scales: bf16; kept as it is.  # [N]
        bias: see `QuantizedLinear`.
        dtype: see `QuantizedLinear`.
    """

    def __init__(
        self, levels: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        assert levels.shape[1] % BLOCK == 0, "the operator's loads do not stop at the end of a row"
        super().__init__(int(levels.shape[1]), int(levels.shape[0]), bias, dtype)
        self._levels, self._scales = levels, scales

    @property
    def num_bytes(self) -> int:
        """See `QuantizedLinear`."""
        return self._levels.nbytes + self._scales.nbytes

    def dequantise(self) -> torch.Tensor:
        """The weight that the layer multiplies with, exactly.  # fp32 [N, K]"""
        return self._levels.float() * self._scales.float()[:, None]

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.data_ptr() % _ALIGNMENT:  # a view into other rows; the operator would crash
            rows = rows.clone()
        out: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, self._levels, self._scales)
        return out


def kernels_available() -> bool:
    """Whether this PyTorch and this CPU have fast kernels for both layers; elsewhere the operators are plain loops."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm")
    return all(hasattr(torch.ops.aten, name) for name in names) and (
        torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest weight with one scale for each row.  # fp32 [N, K] -> int8 [N, K], bf16 [N]"""
    # Rounded first, so that levels are the nearest for the scale that is used. A row of zeros has any scale.
    scales = (weight.abs().amax(dim=1) / 127.0).to(torch.bfloat16)
    divisors = torch.where(scales > 0, scales, 1.0).float()
    levels = (weight / divisors[:, None]).round().clamp(-127, 127).to(torch.int8)
    return levels, scales


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """The int4 operator's own layout, made a few tiles at a time.  # uint8 [N, K] -> uint8 [N, K / 2]"""
    rows = max(1, _CHUNK // (_TILE * levels.shape[1])) * _TILE
    parts = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(part.int(), 1) for part in torch.split(levels, rows)]
    return torch.cat(parts)


def _int4(rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, BLOCK, scales)
    return out
