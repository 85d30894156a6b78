"""Linear layers over weights that oneDNN has laid out once, in advance.

`F.linear` on a CPU re-reads a row-major weight at every call. With the weight reordered beforehand into
oneDNN's blocked layout the few rows of a decode or verify step run faster. One pass through all linear layers
of SmolLM2-135M (30 layers and the head), 2 cores of an AMD EPYC with AVX512-BF16, torch 2.13, median
of 9, in ms:

    rows               1      2      4      8     16     32     64    256
    fp32 F.linear   45.0   72.0   61.8   69.4   80.8  131.7  160.5  539.1
    fp32 packed     30.6   29.7   21.0   26.2   34.0   60.6   98.7  347.2
    bf16 F.linear   24.7   25.2   27.2   30.4   36.8   47.7   74.7  192.7
    bf16 packed     14.8   15.8   13.0   16.4   20.6   31.2   54.6  172.7

Packing wins at every row count in both types, so every layer is packed. Reordering for an assumed row count
(the operator's `batch_size` argument) was slower in fp32 and no faster in bf16, so none is given.

A second gain: a row's result does not depend on how many other rows are in the call, to the last bit (seen
for 1 to 256 rows in both types, with 1, 2 and 4 threads), whereas `F.linear` in fp32 sums in another order
for almost every row count. In fp32 one row alone would be the exception (oneDNN splits the sum of a wide
input), so it is computed as two equal rows, at no measurable cost.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

PACKABLE_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """`nn.Linear` (or GPT-2's `Conv1D`) for inference on a CPU, its weight held in oneDNN's blocked layout.

    The packed weight is not a parameter: it is absent from `state_dict()` and does not follow `.to()`.

    Args:
        linear: the layer to replace; its weight is read, not kept.
    """

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        # A `Conv1D` is a linear layer whose weight lies transposed.
        weight: torch.Tensor = linear.weight.detach()
        weight = weight.t().contiguous() if isinstance(linear, Conv1D) else weight  # [out_features, in_features]
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._widen_single_row = weight.dtype is torch.float32

    @property
    def weight(self) -> torch.Tensor:
        """The weight unpacked again, `[out_features, in_features]`: a copy, for code that looks at it."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        if self._widen_single_row and x.numel() == self.in_features:
            pair = x.reshape(1, self.in_features).expand(2, -1)
            return _packed_linear(pair, self._packed, self.bias)[:1].reshape(*x.shape[:-1], self.out_features)
        return _packed_linear(x, self._packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_linears(model: nn.Module) -> int:
    """Replace, in place, every plain `nn.Linear` or `Conv1D` on the CPU in fp32 or bf16 by a `PackedLinear`.

    The unpacked weights are freed, except one that a tied embedding still reads.

    Returns:
        How many layers were replaced: 0 on other devices and types, and where torch was built without oneDNN.
    """
    if not _operator_available():
        return 0
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, Conv1D) and _can_pack(child)
    ]
    # A layer used in two places is packed once. Weak keys: an original is freed with its last place.
    packed: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()
    replaced = 0
    for parent, name in places:
        linear = parent.get_submodule(name)
        assert isinstance(linear, nn.Linear | Conv1D)
        if linear not in packed:
            packed[linear] = PackedLinear(linear).train(linear.training)
            replaced += 1
        setattr(parent, name, packed[linear])
        del linear
    return replaced


def _packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def _can_pack(linear: nn.Linear | Conv1D) -> bool:
    weight: torch.Tensor = linear.weight
    if weight.device.type != "cpu" or weight.dtype not in PACKABLE_DTYPES or weight.numel() == 0:
        return False
    # Without the instructions oneDNN has no bf16 kernel to reorder for.
    return weight.dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _operator_available() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
