"""4-bit and 8-bit layers and embeddings against a dequantiser that is slow and obvious."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from fakes import needs_tried_kernels
from gguf.constants import GGMLQuantizationType as Kind

from paceline.model.gguf_blocks import BLOCK, BLOCK_BYTES, dequantise, take_apart
from paceline.model.quantized_embedding import QuantizedEmbedding
from paceline.model.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear, round_rows

FOUR_BITS = ("Q4_0", "Q4_1")
SHAPES = [(32, 16), (64, 107), (96, 48), (576, 192), (1536, 80), (64, 1)]  # in, out
ROWS = (0, 1, 2, 3, 4, 5, 8, 16, 33, 64)
pytestmark = needs_tried_kernels


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


def slow_dequantise(rows: torch.Tensor, kind: str, rounded: bool = False) -> torch.Tensor:
    """Weights in Python numbers; `rounded` rounds scales and zeros to bf16 as the int4 operator takes them."""

    def bf16(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float32).bfloat16()) if rounded else x

    out = []
    for row in rows:
        raw, values = bytes(row.tolist()), []
        for at in range(0, len(raw), BLOCK_BYTES[kind]):
            levels, scale, minimum = slow_block(raw[at : at + BLOCK_BYTES[kind]], kind)
            if kind == "Q8_0":
                values += [level * scale for level in levels]
            else:
                zero = bf16(minimum + 8.0 * scale)
                values += [(level - 8) * bf16(scale) + zero for level in levels]
        out.append(values)
    return torch.tensor(out, dtype=torch.float32)


def make(
    shape: tuple[int, int], kind: str, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    """A layer over a random matrix; `int8` has a scale a row."""
    if kind != "int8":
        return Int4Linear(take_apart(stored(shape, kind), kind), bias, dtype)
    torch.manual_seed(0)
    return Int8Linear(*round_rows(torch.randn(*shape[::-1])), bias, dtype)


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


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_holds_the_files_weights_to_the_rounding_of_scales(shape: tuple[int, int], kind: str) -> None:
    """Exactly `(level - 8) * bf16(scale) + bf16(zero)`, no further from the file than two roundings can take it."""
    rows = stored(shape, kind)
    layer = make(shape, kind)
    held = layer.dequantise()
    assert torch.equal(held, slow_dequantise(rows, kind, rounded=True))
    blocks = take_apart(rows, kind)
    bound = 2**-8 * (8 * blocks.scales.abs() + (blocks.minimums + 8 * blocks.scales).abs())
    error = (held - dequantise(rows, kind)).abs().unflatten(1, (-1, BLOCK)).amax(-1)
    assert (error <= bound * (1 + 1e-5)).all()
    assert float(error.max()) < 0.02 * float(held.abs().max())  # in practice


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*FOUR_BITS, "int8"])
def test_every_shape_and_row_count(kind: str, shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    """The product of bf16 inputs with the weight held, off by the rounding of the result to bf16."""
    added = torch.linspace(-1, 1, shape[1]) if bias else None
    layer = make(shape, kind, added, dtype)
    weight = layer.dequantise()
    assert layer.weight.shape == (shape[1], shape[0])
    for rows in ROWS:
        x = torch.randn(rows, shape[0]).to(dtype)
        got = layer(x)
        assert got.shape == (rows, shape[1])
        assert got.dtype == dtype
        expected = x.bfloat16().float() @ weight.t() + (0 if layer.bias is None else layer.bias)
        scale = x.float().norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
        assert ((got.float() - expected).abs() <= 2**-7 * (expected.abs() + 0.02 * scale + 1)).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [*FOUR_BITS, "int8"])
def test_a_row_does_not_depend_on_the_number_of_rows(kind: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in [(576, 192), (1536, 576), (64, 1008), (576, 4096)]:
            layer = make(shape, kind)
            x = torch.randn(64, shape[0])
            full = layer(x)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 63):
                assert torch.equal(layer(x[:rows]), full[:rows]), rows
                assert torch.equal(layer(x[64 - rows :]), full[64 - rows :]), rows
    finally:
        torch.set_num_threads(before)


def test_shapes_and_strides() -> None:
    for layer in (make((32, 16), "Q4_1"), make((32, 16), "int8")):
        weight = layer.dequantise()
        for x in (torch.randn(32), torch.randn(1, 1, 32), torch.randn(32, 6).t(), torch.randn(6, 64)[:, ::2]):
            got = layer(x)
            assert got.shape == (*x.shape[:-1], 16)
            assert torch.allclose(got, x.bfloat16().float() @ weight.t(), rtol=2**-7, atol=2**-6)


def test_rows_at_an_odd_address() -> None:
    """PyTorch's int8 operator loads its input as if it were aligned."""
    for kind in ("Q4_1", "int8"):
        layer = make((64, 16), kind, dtype=torch.bfloat16)
        buffer = torch.randn(4 * 64 + 3).bfloat16()
        for offset in (1, 2, 3):
            x = buffer[offset : offset + 256].view(4, 64)
            assert torch.equal(layer(x), layer(x.clone()))


def test_weights_are_no_parameters() -> None:
    for layer in (make((32, 16), kind, torch.ones(16)) for kind in ("Q4_0", "int8")):
        assert list(layer.state_dict()) == ["bias"]
        assert not any(p.requires_grad for p in layer.parameters())
        assert layer.weight.dtype == torch.float32


def test_sizes_are_counted() -> None:
    assert make((64, 32), "Q4_0").num_bytes == 64 * 32 // 2 + 4 * 64 * 32 // 32
    assert make((64, 32), "int8").num_bytes == 64 * 32 + 2 * 32


def test_rounding_to_one_scale_a_row() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 64) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0.0
    levels, scales = round_rows(weight)
    held = levels.float() * scales.float()[:, None]
    # Half a level; where the scale was rounded down, the largest may be cut by as much as the scale lost.
    assert ((held - weight).abs() <= 0.5 * scales.float()[:, None] + 2**-8 * weight.abs().amax(1, keepdim=True)).all()
    assert (held[7] == 0).all()


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
