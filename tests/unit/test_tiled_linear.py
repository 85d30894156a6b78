"""Layers in tiles, and embeddings in blocks, against a dequantiser that is slow and obvious."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind

from paceline.model.gguf_blocks import BLOCK_BYTES, dequantise, take_apart
from paceline.model.quantized_embedding import QuantizedEmbedding
from paceline.model.tiled_linear import TiledLinear, tile_blocks, tile_linears, tile_weight

ROUNDING = tuple(f"{kind} in 8 bits" for kind in BLOCK_BYTES)
KINDS = (*BLOCK_BYTES, *ROUNDING, "BF16", "F32")
SHAPES = [(32, 16), (64, 107), (96, 48), (576, 192), (1536, 80), (64, 1)]  # in, out
ROWS = (0, 1, 2, 3, 4, 5, 8, 16, 33, 64)


def stored(shape: tuple[int, int], kind: str, seed: int = 0) -> torch.Tensor:
    """A random matrix of `shape` (in, out), as the `gguf` package stores it."""
    weight = np.random.default_rng(seed).standard_normal(shape[::-1]).astype(np.float32)
    return torch.from_numpy(gguf.quants.quantize(weight, Kind[kind]))


def slow_block(block: bytes, kind: str) -> tuple[list[int], float, float]:
    """Levels, scale and minimum of one block, byte by byte."""
    (scale,) = struct.unpack("<e", block[:2])
    if kind == "Q8_0":
        return list(struct.unpack("<32b", block[2:])), scale, 0.0
    minimum = struct.unpack("<e", block[2:4])[0] if kind == "Q4_1" else -8.0 * scale
    packed = block[4:] if kind == "Q4_1" else block[2:]
    return [byte & 15 for byte in packed] + [byte >> 4 for byte in packed], scale, minimum


def slow_dequantise(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Weights in Python numbers."""
    out = []
    for row in rows:
        raw, values = bytes(row.tolist()), []
        for at in range(0, len(raw), BLOCK_BYTES[kind]):
            levels, scale, minimum = slow_block(raw[at : at + BLOCK_BYTES[kind]], kind)
            values += [level * scale + minimum for level in levels]
        out.append(values)
    return torch.tensor(out, dtype=torch.float32)


def make(
    shape: tuple[int, int], kind: str, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> TiledLinear:
    """A layer over a random matrix."""
    kind, _, rounds = kind.partition(" in ")
    if kind in BLOCK_BYTES:
        return tile_blocks(take_apart(stored(shape, kind), kind), bias, dtype, rounds_inputs=bool(rounds))
    torch.manual_seed(0)
    weight = torch.randn(*shape[::-1])
    return tile_weight(weight.bfloat16() if kind == "BF16" else weight, bias, dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Inputs as a layer that rounds them sees them: 127 steps up to the largest of every 32."""
    blocks = x.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    whole = torch.where(largest > 0, (blocks * (torch.tensor(127.0) / largest)).round(), 0.0).double()
    return (whole * (largest / 127)).reshape(x.shape)


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_blocks_are_read_as_gguf_reads_them(kind: str) -> None:
    rows = stored((96, 7), kind)
    expected = gguf.quants.dequantize(rows.numpy(), Kind[kind])
    assert np.array_equal(dequantise(rows, kind).numpy(), expected)
    assert np.abs(slow_dequantise(rows, kind).numpy() - expected).max() < 1e-6
    every = torch.arange(256, dtype=torch.uint8).repeat(1 + BLOCK_BYTES[kind] // 2)[: 256 * BLOCK_BYTES[kind] // 2]
    every = every.reshape(-1, BLOCK_BYTES[kind]).clone()  # all bytes as levels, under a scale of a half
    every[:, :2] = torch.tensor(list(struct.pack("<e", 0.5)), dtype=torch.uint8)
    if kind == "Q4_1":
        every[:, 2:4] = every[:, :2]
    assert torch.equal(dequantise(every, kind), slow_dequantise(every, kind))


@pytest.mark.parametrize("kind", [*BLOCK_BYTES, *ROUNDING])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_hold_the_files_weights_exactly(shape: tuple[int, int], kind: str) -> None:
    name = kind.partition(" in ")[0]
    assert torch.equal(make(shape, kind).dequantise(), dequantise(stored(shape, name), name))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_and_row_count(kind: str, shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    """The product with the weight held, to fp32 rounding, and to that of the result's type."""
    added = torch.linspace(-1, 1, shape[1]) if bias else None
    layer = make(shape, kind, added, dtype)
    weight = layer.dequantise().double()
    assert layer.weight.shape == (shape[1], shape[0])
    for rows in ROWS:
        x = torch.randn(rows, shape[0]).to(dtype)
        got = layer(x)
        assert got.shape == (rows, shape[1])
        assert got.dtype == dtype
        seen = rounded(x) if layer.rounds_inputs else x.double()
        expected = seen @ weight.t() + (0 if layer.bias is None else layer.bias)
        scale = x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
        rounding = 1e-6 * scale + (2**-7 * (expected.abs() + 1) if dtype is torch.bfloat16 else 1e-6)
        assert ((got.double() - expected).abs() <= rounding).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_else(kind: str, threads: int) -> None:
    """Neither on the number of rows nor on threads, to the bit."""
    before = torch.get_num_threads()
    try:
        for shape in [(576, 192), (1536, 576), (64, 1008), (576, 4096)]:
            layer = make(shape, kind)
            x = torch.randn(64, shape[0])
            torch.set_num_threads(1)
            full = layer(x)
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 63, 64):
                assert torch.equal(layer(x[:rows]), full[:rows]), rows
                assert torch.equal(layer(x[64 - rows :]), full[64 - rows :]), rows
    finally:
        torch.set_num_threads(before)


def test_shapes_and_strides() -> None:
    for layer in (make((32, 16), kind) for kind in KINDS if kind not in ROUNDING):
        weight = layer.dequantise()
        for x in (torch.randn(32), torch.randn(1, 1, 32), torch.randn(32, 6).t(), torch.randn(6, 64)[:, ::2]):
            got = layer(x)
            assert got.shape == (*x.shape[:-1], 16)
            assert torch.allclose(got, x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ROUNDING)
def test_the_largest_sums_fit(kind: str) -> None:
    """Levels and inputs at their ends, all of one sign: no sum on the way saturates."""
    layer, name = make((64, 16), kind), kind.partition(" in ")[0]
    for byte in (0x00, 0xFF, 0x7F, 0x80):
        rows = stored((64, 16), name)
        rows.view(16, 2, -1)[:, :, 2 if name != "Q4_1" else 4 :] = byte
        layer = tile_blocks(take_apart(rows, name), None, torch.float32, rounds_inputs=True)
        for x in (torch.ones(1, 64), -torch.ones(1, 64), torch.tensor([[1.0, -1.0]]).repeat(1, 32)):
            exact = x.double() @ layer.dequantise().double().t()
            assert torch.allclose(layer(x).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ROUNDING)
def test_rows_that_rounding_cannot_hold(kind: str) -> None:
    """Nothing but zeros is zero; what is not finite stays so, in its row alone."""
    layer = make((64, 48), kind)
    x = torch.randn(5, 64)
    clean = layer(x)
    x[1] = 0.0
    x[2, 40], x[3, 3] = float("nan"), float("inf")
    x[4] *= 1e-42
    found = layer(x)
    assert torch.equal(found[0], clean[0])
    assert not found[1].any()
    assert not found[2:4].isfinite().any()
    assert found[4].isfinite().all()


def test_rows_at_an_odd_address() -> None:
    for kind in KINDS:
        layer = make((64, 16), kind)
        buffer = torch.randn(4 * 64 + 3)
        for offset in (1, 2, 3):
            x = buffer[offset : offset + 256].view(4, 64)
            assert torch.equal(layer(x), layer(x.clone()))


def test_weights_are_no_parameters() -> None:
    for layer in (make((32, 16), kind, torch.ones(16)) for kind in KINDS):
        assert list(layer.state_dict()) == ["bias"]
        assert not any(p.requires_grad for p in layer.parameters())
        assert layer.weight.dtype == torch.float32


def test_sizes_are_counted() -> None:
    assert make((64, 32), "Q4_0").num_bytes == 64 * 32 // 2 + 4 * 64 * 32 // 32
    assert make((64, 32), "Q8_0").num_bytes == 64 * 32 + 2 * 64 * 32 // 32
    assert make((64, 32), "BF16").num_bytes == 2 * 64 * 32


def test_plain_layers_are_tiled_in_bf16_where_that_loses_nothing() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 64), torch.nn.Linear(64, 5, bias=False))
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.bfloat16())
    weights = [layer.weight.detach().clone() for layer in model]
    tile_linears(model)
    assert [getattr(layer, "kind", None) for layer in model] == ["F32", None, "BF16"]  # 48 inputs are no blocks
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_an_embedding_looks_rows_up_exactly(kind: str, dtype: torch.dtype) -> None:
    rows = stored((96, 50), kind)
    table = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), Kind[kind])).to(dtype)
    embedding = QuantizedEmbedding(rows, kind, dtype)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (50, 96)
    ids = torch.tensor([[3, 49, 3], [0, 1, 2]])
    assert torch.equal(embedding(ids), table[ids])
    assert embedding(ids[:, :0]).shape == (2, 0, 96)
    assert torch.equal(embedding.weight, table)
    assert not embedding.state_dict()
    with pytest.raises(IndexError):
        embedding(torch.tensor([50]))
