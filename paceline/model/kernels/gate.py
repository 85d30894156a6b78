"""An MLP's gate, for rows whose products a library computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paceline.model.kernels.overlap import launch_options, let_next_begin, wait_for_inputs

_BLOCK = 1024


@triton.jit
def _gate(both, out, both_stride, out_stride, INNER: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    if OVERLAP:
        let_next_begin()
        wait_for_inputs()
    gate = tl.load(both + row * both_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * both_stride + INNER + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def apply_gate(both: torch.Tensor, out: torch.Tensor, *, overlap: bool = False) -> torch.Tensor:
    """`silu(left half) * right half` of every row.  # both [num_rows, 2 * inner], out [num_rows, inner]"""
    num_rows, inner = out.shape
    _gate[(num_rows, triton.cdiv(inner, _BLOCK))](
        both,
        out,
        both.stride(0),
        out.stride(0),
        INNER=inner,
        BLOCK=_BLOCK,
        OVERLAP=overlap,
        num_warps=4,
        **launch_options(overlap),
    )
    return out


def gate_twin(both: torch.Tensor) -> torch.Tensor:
    """The same in plain operations, in fp32.  # [num_rows, inner]"""
    left, right = both.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(left) * right
