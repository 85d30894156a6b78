"""`PackedLinear` against `F.linear`, alone and inside every architecture."""

from __future__ import annotations

import pytest
import torch
from fakes import ARCHITECTURES, make_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from paceline.model.packed_linear import PackedLinear, pack_linears

BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU lacks the instructions for bf16"
    ),
)
SHAPES = [(576, 192), (96, 320), (17, 50), (1536, 64)]  # in, out
ROWS = [0, 1, 2, 3, 8, 32, 256]
LINEARS = {  # in the three layers of a tiny model, and the head
    **dict.fromkeys(ARCHITECTURES, 3 * 7 + 1),
    "phi3": 3 * 4 + 1,
    "gpt2": 3 * 4 + 1,
    "opt": 3 * 6 + 1,
    "qwen2_moe": 3 * 4 + 3 + 2 * (3 + 1) + 1,  # a plain layer, two with a shared expert and its gate
    "qwen3_moe": 3 * 4 + 3 + 1,
}


def make_linear(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*shape, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_equals_linear(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    linear = make_linear(shape, dtype, bias)
    packed = PackedLinear(linear)
    for rows in ROWS:
        x = torch.randn(rows, shape[0]).to(dtype)
        expected, got = linear(x), packed(x)
        assert got.shape == expected.shape
        assert got.dtype == dtype
        assert torch.allclose(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_row_does_not_depend_on_the_number_of_rows(dtype: torch.dtype) -> None:
    for shape in [(576, 192), (1536, 576), (64, 1000)]:
        packed = PackedLinear(make_linear(shape, dtype, bias=False))
        x = torch.randn(64, shape[0]).to(dtype)
        full = packed(x)
        for rows in (1, 2, 3, 5, 8, 16, 33):
            assert torch.equal(packed(x[:rows]), full[:rows])


def test_shapes_and_strides() -> None:
    linear = make_linear((32, 8), torch.float32, bias=True)
    packed = PackedLinear(linear)
    for x in (
        torch.randn(32),
        torch.randn(1, 1, 32),
        torch.randn(2, 3, 32),
        torch.randn(32, 6).t(),
        torch.randn(6, 64)[:, ::2],
    ):
        got = packed(x)
        assert got.shape == (*x.shape[:-1], 8)
        assert torch.allclose(got, linear(x), rtol=1e-5, atol=1e-5)


def test_weight_can_be_read_back() -> None:
    linear = make_linear((17, 50), torch.float32, bias=False)
    packed = PackedLinear(linear)
    assert torch.equal(packed.weight, linear.weight)
    assert "weight" not in packed.state_dict()


def test_unsupported_layers_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta"))
    assert pack_linears(model) == 0
    assert all(type(layer) is nn.Linear for layer in model)


def test_a_shared_layer_is_packed_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(4, 4))})
    assert pack_linears(model) == 2
    assert model["a"][0] is model["b"][0]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_transposed_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Conv1D(50, 17).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(layer.bias)
    packed = PackedLinear(layer)
    assert (packed.in_features, packed.out_features) == (17, 50)
    assert torch.equal(packed.weight, layer.weight.t())
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    for rows in (1, 2, 33):
        x = torch.randn(1, rows, 17).to(dtype)
        assert torch.allclose(packed(x).float(), layer(x).float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_architectures_run_packed(arch: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tied = arch in ("llama", "gemma2", "gpt2")
    config = make_config(arch, tie_word_embeddings=tied, initializer_range=0.1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        before = model(ids).logits.float()
        assert pack_linears(model) == LINEARS[arch]
        after = model(ids).logits.float()
        model.generate(ids, max_new_tokens=3, do_sample=False)
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    assert torch.allclose(before, after, rtol=tolerance, atol=tolerance * before.abs().max().item())
    assert model.dtype == dtype
    assert model.get_input_embeddings().weight.shape == (96, 32)
