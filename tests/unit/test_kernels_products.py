"""Products, norms and gates of a decoder layer against their twins."""

from __future__ import annotations

import pytest
import torch
from kernel_tools import DEVICE
from torch.testing import assert_close

pytest.importorskip("triton")

from paceline.model.gpu.tiles import tile_for
from paceline.model.kernels.gate import apply_gate, gate_twin
from paceline.model.kernels.norms import rms_norm, rms_norm_twin
from paceline.model.kernels.products import Tile, product, product_twin

DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]
TOLERANCE = {torch.float32: {"atol": 2e-3, "rtol": 2e-3}, torch.bfloat16: {"atol": 5e-2, "rtol": 2e-2}}
SMALL = Tile(16, 32, 32, 4, 2)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Numbers of any sign."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize(("columns", "inner"), [(40, 48), (33, 64), (64, 100)])
@pytest.mark.parametrize("kind", ["plain", "bias", "residual", "gated"])
def test_products(dtype: torch.dtype, rows: int, columns: int, inner: int, kind: str) -> None:
    x = random(rows, inner, dtype=dtype)
    weight = random(columns * (2 if kind == "gated" else 1), inner, dtype=dtype, seed=1) * inner**-0.5
    options = {
        "plain": {},
        "bias": {"bias": random(columns, dtype=dtype, seed=2)},
        "residual": {"residual": random(rows, columns, dtype=dtype, seed=3)},
        "gated": {"gated": True},
    }[kind]
    out = torch.full((rows, columns), float("nan"), dtype=dtype, device=DEVICE)
    found = product(x, weight, SMALL, out=out, **options)
    assert_close(found.float(), product_twin(x, weight, **options), **TOLERANCE[dtype])


def test_a_sum_may_be_written_over_its_residual() -> None:
    x, weight, residual = random(3, 48), random(40, 48, seed=1), random(3, 40, seed=2)
    expected = product_twin(x, weight, residual=residual)
    assert_close(product(x, weight, SMALL, residual=residual, out=residual), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (48, 64)])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(shape: tuple[int, int]) -> None:
    columns, inner = shape
    x, weight = random(16, inner, dtype=DTYPES[-1]), random(columns, inner, dtype=DTYPES[-1], seed=1)
    tile = tile_for(16, columns, inner)
    assert tile is not None
    together = product(x, weight, tile)
    assert torch.equal(product(x[5:6], weight, tile), together[5:6])


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_every_shape_has_a_tile_up_to_64_rows(rows: int) -> None:
    for columns in (40, 576, 6144, 28672, 128256):
        for inner in (48, 576, 14336):
            tile = tile_for(rows, columns, inner)
            assert tile is not None
            assert tile.rows >= min(rows, 16)
    assert tile_for(65, 576, 576) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3])
def test_norms(dtype: torch.dtype, heads: int) -> None:
    x = random(5, 100, dtype=dtype)
    weight = random(heads, 24, dtype=dtype, seed=1) if heads > 1 else random(100, dtype=dtype, seed=1)
    found = rms_norm(x, weight, 1e-5)
    assert_close(found.float(), rms_norm_twin(x, weight, 1e-5), **TOLERANCE[dtype])
    into = x.clone()
    rms_norm(into, weight, 1e-5, into)
    assert torch.equal(into[:, : weight.numel()], found)
    assert torch.equal(into[:, weight.numel() :], x[:, weight.numel() :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype) -> None:
    both = random(3, 2 * 1100, dtype=dtype)
    out = torch.full((3, 1100), float("nan"), dtype=dtype, device=DEVICE)
    assert_close(apply_gate(both, out).float(), gate_twin(both), **TOLERANCE[dtype])
