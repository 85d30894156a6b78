"""RMS norms of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paceline.model.kernels.overlap import launch_options, let_next_begin, wait_for_inputs


@triton.jit
def _rms_norm(
    x,
    weight,
    out,
    epsilon,
    x_stride,
    out_stride,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    column += tl.program_id(1) * WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0)
    if OVERLAP:
        let_next_begin()
        wait_for_inputs()
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + epsilon)
    # Rounded before the weight is applied, as `transformers` does.
    values = values.to(out.dtype.element_ty) * scale
    tl.store(out + row * out_stride + column, values.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor | None = None, *, overlap: bool = False
) -> torch.Tensor:
    """`x / rms(x) * weight` of every row, or of every head of a row.

    Args:
        x: contiguous along the last dimension.  # [num_rows, columns], at least `weight.numel()` columns
        weight: of the norm, or one for each head.  # [width], or [heads, width]
        epsilon: added to the mean square.
        out: where to write; may be `x`.
        overlap: see `overlap.py`.
    """
    num_rows, width = x.shape[0], weight.shape[-1]
    if out is None:
        out = torch.empty(num_rows, weight.numel(), dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(width)
    _rms_norm[(num_rows, weight.numel() // width)](
        x,
        weight,
        out,
        epsilon,
        x.stride(0),
        out.stride(0),
        WIDTH=width,
        PADDED=padded,
        OVERLAP=overlap,
        num_warps=min(max(padded // 256, 1), 16),
        **launch_options(overlap),
    )
    return out


def rms_norm_twin(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The same in plain operations, in fp32.  # [num_rows, weight.numel()]"""
    wide = x[:, : weight.numel()].float().view(len(x), -1, weight.shape[-1])
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon) * weight.float()
    return normed.flatten(1)
