"""Products of few rows with a weight matrix, and what follows them in a decoder layer.

At decode sizes a small model's time is kernel launches and a large one's is reading weights, so sums with the residual
and an MLP's gate are done where a product's rows are written. (What comes *before* a product is not: rows that pass
through registers cannot be fetched while others are multiplied, which took two to four times as long.)

Every output is summed along the inner dimension in the same order whatever the number of rows, in tiles of a fixed
shape, so a row's bits do not depend on the batch as long as the same tile serves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from paceline.model.kernels.overlap import launch_options, let_next_begin, wait_for_inputs


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of one program's part of a product."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["num_rows"])  # compiled once, not for every kind of batch
def _product(
    x,
    weight,
    bias,
    residual,
    out,
    num_rows,
    num_columns,
    x_stride,
    out_stride,
    INNER: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_columns, in_rows = columns < num_columns, rows < num_rows
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    weight_columns = weight + columns.to(tl.int64)[None, :] * INNER
    up_columns = weight_columns + num_columns.to(tl.int64) * INNER
    if OVERLAP:
        wait_for_inputs()
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, STEP):
        inner = start + tl.arange(0, STEP)
        in_inner = inner < INNER
        inside = in_columns[None, :] & in_inner[:, None]
        values = tl.load(x_rows + inner[None, :], mask=in_rows[:, None] & in_inner[None, :], other=0.0)
        weights = tl.load(weight_columns + inner[:, None], mask=inside, other=0.0)
        total = tl.dot(values, weights, total, input_precision=PRECISION)
        if GATED:
            weights = tl.load(up_columns + inner[:, None], mask=inside, other=0.0)
            total_up = tl.dot(values, weights, total_up, input_precision=PRECISION)
    if OVERLAP:
        let_next_begin()
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * total_up
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    place = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    written = in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + place, mask=written, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=written)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: Tile,
    *,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """`x @ weight.T + bias + residual`, or `silu(x @ gate.T) * (x @ up.T)`, in one kernel.

    Args:
        x: rows, contiguous along the last dimension.  # [num_rows, inner]
        weight: contiguous; with `gated` the gate's rows, then those of up.  # [num_columns (x 2 if gated), inner]
        tile: its shape.
        bias: added to every row; not with `gated`.  # [num_columns]
        gated: whether the weight is an MLP's gate and up projection.
        residual: added to the result; may be `out` itself.  # [num_rows, num_columns]
        out: where to write.  # [num_rows, num_columns]
        overlap: see `overlap.py`.
    """
    num_columns, inner = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    num_rows = x.shape[0]
    if out is None:
        out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    assert residual is None or residual.stride() == out.stride()
    grid = (triton.cdiv(num_columns, tile.columns), triton.cdiv(num_rows, tile.rows))
    unused: Any = weight
    _product[grid](
        x,
        weight,
        unused if bias is None else bias,
        unused if residual is None else residual,
        out,
        num_rows,
        num_columns,
        x.stride(0),
        out.stride(0),
        INNER=inner,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEP=tile.inner,
        OVERLAP=overlap,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
        **launch_options(overlap),
    )
    return out


def product_twin(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain operations, in fp32.  # [num_rows, num_columns]"""
    total = x.float() @ weight.float().T
    if gated:
        gate, up = total.chunk(2, dim=-1)
        total = torch.nn.functional.silu(gate) * up
    total = total if bias is None else total + bias.float()
    return total if residual is None else total + residual.float()
