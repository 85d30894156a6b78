"""GGUF files that keep their precision: loaded end to end, compared with a plain model of the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files as tiny
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import save_file

from paceline import LLM, SamplingParams
from paceline.bench import roofline
from paceline.errors import ConfigError, CorruptFileError, PacelineError, UnsupportedModelError
from paceline.model import loader, quantized_loading
from paceline.model.convert import BLOCKS_FILE, BLOCKS_FORMAT
from paceline.model.loader import LoadedModel, load_model
from paceline.model.native import integer_kernel
from paceline.model.packed_linear import PackedLinear
from paceline.model.quantized_embedding import QuantizedEmbedding
from paceline.model.tiled_linear import TiledLinear

IDS = torch.tensor([[3, 40, 7, 99, 2, 15, 60, 60]])
KEPT = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def made(tmp_path: Path, kind: Kind, arch: str = "llama", tied: bool = False, **extra: Any) -> tuple[Path, Any]:
    """A GGUF file, and the fp32 model of its dequantised weights."""
    path, model = tmp_path / "m.gguf", tiny.make_model(arch, tied=tied)
    model.load_state_dict(tiny.write_gguf(path, arch, model, kind, **extra), strict=False)
    return path, model


def plain(loaded: LoadedModel, reference: Any) -> Any:
    """The reference with the weights that the loaded model really multiplies with."""
    for name, module in loaded.model.named_modules():
        if isinstance(module, TiledLinear):
            weight = torch.nn.Parameter(module.dequantise(), requires_grad=False)
            reference.get_submodule(name).weight = weight  # a tied head is parted from its embedding here
    return reference


@torch.inference_mode()
def engine_logits(loaded: LoadedModel) -> torch.Tensor:
    loaded.model.set_attn_implementation("sdpa")  # the plain model's, which needs no cache
    return loaded.model(IDS).logits.float()


@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False)])
@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("activations", ["float32", "auto"])
def test_the_files_precision_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: str, kind: Kind, arch: str, tied: bool
) -> None:
    monkeypatch.setattr(loader, "resolve_dtype", lambda *_: torch.bfloat16)  # fp32 around the products on every CPU
    path, reference = made(tmp_path, kind, arch, tied)
    loaded = load_model(str(path), device="cpu", activations=activations)
    rounds = activations == "auto"
    assert loaded.rounds_inputs == rounds
    assert loaded.kept_kinds == (kind.name,)
    assert loaded.model.dtype == loaded.dtype == torch.float32
    assert loaded.precision == f"{kind.name} in {'int8' if rounds else 'float32'}"
    layers = [module for module in loaded.model.modules() if isinstance(module, torch.nn.Linear | TiledLinear)]
    assert {getattr(layer, "kind", None) for layer in layers} == {"Q8" if kind is Kind.Q8_0 else "Q4"}
    assert len(layers) == 2 * 7 + 1
    assert all(layer.rounds_inputs == rounds for layer in layers)
    embedding = loaded.model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert torch.equal(embedding(IDS), reference.model.embed_tokens(IDS).to(loaded.dtype))
    with torch.inference_mode():
        expected = plain(loaded, reference)(IDS).logits
    error = (engine_logits(loaded) - expected).norm() / expected.norm()
    assert error < (0.05 if rounds else 1e-5)


def test_a_cpu_without_the_instructions_does_not_round_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(integer_kernel, "integer_instructions", lambda: "")
    path, _ = made(tmp_path, Kind.Q4_0)
    assert not load_model(str(path), device="cpu").rounds_inputs
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "float32" in caplog.text


def test_activations_without_kept_weights_are_refused(tmp_path: Path) -> None:
    path, _ = made(tmp_path, Kind.Q4_0)
    with pytest.raises(ConfigError, match="activations"):
        LLM(str(path), device="cpu", dtype="float32", activations="float32")
    assert not LLM(str(path), device="cpu", activations="float32", kv_cache_memory=4 << 20).loaded.rounds_inputs


@pytest.mark.parametrize("kind", [*KEPT, Kind.F16, Kind.F32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_named_dtype_dequantises(tmp_path: Path, kind: Kind, dtype: str) -> None:
    path, reference = made(tmp_path, kind)
    loaded = load_model(str(path), dtype=dtype, device="cpu")
    assert loaded.precision == dtype
    kept = load_model(str(path), dtype="auto", device="cpu")
    assert (kept.eos_token_ids, kept.max_model_len) == (loaded.eos_token_ids, loaded.max_model_len)
    assert all(type(m) is torch.nn.Linear for m in loaded.model.modules() if hasattr(m, "in_features"))
    for name, weight in reference.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight.to(loaded.dtype)), name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.F32, Kind.Q5_0])
def test_other_files_have_nothing_to_keep(tmp_path: Path, kind: Kind) -> None:
    path, _ = made(tmp_path, kind)
    loaded = load_model(str(path), dtype="auto", device="cpu")
    assert loaded.kept_kinds == ()
    assert not (loaded.path / BLOCKS_FILE).exists()


def test_matrices_of_other_types_are_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture: Q6_K in the middle of Q4_0, as llama.cpp writes it, an embedding in F16 that the head shares."""
    monkeypatch.setattr(tiny, "INNER", 256)  # a block of Q6_K
    raw = np.random.default_rng(0).integers(0, 256, (tiny.HIDDEN, 210), dtype=np.uint8)
    raw[:, -2:] = np.frombuffer(np.float16(1e-4).tobytes(), dtype=np.uint8)  # the scale of the block
    table = tiny.make_model("llama", tied=True).model.embed_tokens.weight.half().numpy()
    mixture = {"blk.1.ffn_down.weight": (raw, Kind.Q6_K), "token_embd.weight": (table, Kind.F16)}
    path, reference = made(tmp_path, Kind.Q4_0, tied=True, raw=mixture)
    loaded = load_model(str(path), dtype="auto", device="cpu", activations="float32")
    assert loaded.kept_kinds == ("Q4_0",)
    down = loaded.model.model.layers[1].mlp.down_proj
    assert torch.equal(down.weight, reference.model.layers[1].mlp.down_proj.weight.to(loaded.dtype))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    with torch.inference_mode():
        expected = plain(loaded, reference)(IDS).logits
    assert (engine_logits(loaded) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_the_engine_runs_it_with_every_kind_of_draft(tmp_path: Path, tied: bool) -> None:
    path, _ = made(tmp_path, Kind.Q8_0, tied=tied)
    loaded = load_model(str(path), dtype="auto", device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    options: dict[str, Any] = {"kv_cache_memory": 4 << 20, "enable_prefix_caching": False}
    expected = LLM(loaded, speculation="none", **options).generate([[5, 6, 7, 5, 6]], params)[0].token_ids
    for spec in ("ngram:k=3", f'draft:k=3,model="{path}"', f'draft:k=3,model="{path}",vocab="{_ranking(tmp_path)}"'):
        llm = LLM(loaded, speculation=spec, **options)
        assert llm.generate([[5, 6, 7, 5, 6]], params)[0].token_ids == expected
    assert not any(isinstance(m, PackedLinear) for m in loaded.model.modules())


def _ranking(tmp_path: Path) -> Path:
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps({"token_ids": list(range(3, 60))}))
    return path


def test_the_roofline_counts_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = made(tmp_path, Kind.Q4_1)
    for name in ("measure_bandwidth", "measure_flops"):
        monkeypatch.setattr(roofline, name, lambda *_: 1e9)
    kept, plain_one = (load_model(str(path), dtype=dtype, device="cpu") for dtype in ("auto", "float32"))
    found, expected = roofline.measure_roofline(kept), roofline.measure_roofline(plain_one)
    assert found.weights == expected.weights
    assert 4.5 / 8 < found.bytes_per_weight < 0.75 < expected.bytes_per_weight == 4  # 4 bits and scales; norms


def test_without_numba_it_dequantises_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = made(tmp_path, Kind.Q4_1)
    monkeypatch.setattr(quantized_loading, "find_spec", lambda _: None)
    loaded = load_model(str(path), dtype="auto", device="cpu")
    assert loaded.kept_kinds == ()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "dequantised" in caplog.text


def _without_metadata(_: dict[str, torch.Tensor], kinds: dict[str, str]) -> None:
    kinds.clear()


def _unknown_kind(_: dict[str, torch.Tensor], kinds: dict[str, str]) -> None:
    kinds["lm_head.weight"] = "Q5_K"


def _foreign_name(tensors: dict[str, torch.Tensor], kinds: dict[str, str]) -> None:
    tensors["lm_head.weights"], kinds["lm_head.weights"] = tensors.pop("lm_head.weight"), kinds.pop("lm_head.weight")


def _a_norm(tensors: dict[str, torch.Tensor], kinds: dict[str, str]) -> None:
    tensors["model.norm.weight"], kinds["model.norm.weight"] = (
        tensors.pop("lm_head.weight"),
        kinds.pop("lm_head.weight"),
    )


def _a_row_less(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].clone()


def _half_blocks(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, 1:].clone()


def _another_type(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()


@pytest.mark.parametrize(
    "damage",
    [_without_metadata, _unknown_kind, _foreign_name, _a_norm, _a_row_less, _half_blocks, _another_type],
)
def test_blocks_that_do_not_fit_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor], dict[str, str]], None]
) -> None:
    path, _ = made(tmp_path, Kind.Q4_1)
    folder = tmp_path / "copy"
    shutil.copytree(load_model(str(path), dtype="auto", device="cpu").path, folder)
    with safe_open(folder / BLOCKS_FILE, framework="pt") as file:
        kinds = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in tuple(file.keys())}
    assert kinds.pop("format") == BLOCKS_FORMAT
    damage(tensors, kinds)
    save_file(tensors, folder / BLOCKS_FILE, {"format": BLOCKS_FORMAT, **kinds})
    with pytest.raises(CorruptFileError, match=BLOCKS_FILE):
        load_model(str(folder), dtype="auto", device="cpu")


def test_a_weight_that_is_nowhere_is_missed(tmp_path: Path) -> None:
    path, _ = made(tmp_path, Kind.Q4_1)
    folder = tmp_path / "copy"
    shutil.copytree(load_model(str(path), dtype="auto", device="cpu").path, folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in tuple(file.keys()) if name != "model.norm.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"model\.norm\.weight"):
        load_model(str(folder), dtype="auto", device="cpu")


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [
        ("model.norm.weight", 7, CorruptFileError),
        ("model.layers.0.mlp.up_proj.bias2", 7, UnsupportedModelError),
        ("model.layers.0.self_attn.q_proj.bias", tiny.HIDDEN + 1, UnsupportedModelError),
    ],
)
def test_other_weights_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, shape: int, error: type[PacelineError]
) -> None:
    path, _ = made(tmp_path, Kind.Q4_1)
    folder = tmp_path / "copy"
    shutil.copytree(load_model(str(path), dtype="auto", device="cpu").path, folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in tuple(file.keys())}
    save_file({**tensors, name: torch.ones(shape)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=r"model\.safetensors"):
        load_model(str(folder), dtype="auto", device="cpu")


@pytest.mark.parametrize("shape", [None, 7])
def test_a_bias_is_neither_dropped_nor_stretched(tmp_path: Path, shape: int | None) -> None:
    path, _ = made(tmp_path, Kind.Q4_1, "qwen2")
    folder, name = tmp_path / "copy", "model.layers.1.self_attn.v_proj.bias"
    shutil.copytree(load_model(str(path), dtype="auto", device="cpu").path, folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in tuple(file.keys()) if key != name}
    if shape is not None:
        tensors[name] = torch.ones(shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=name):
        load_model(str(folder), dtype="auto", device="cpu")


def test_the_stored_blocks_are_the_files_bytes(tmp_path: Path) -> None:
    """Rows of queries and keys in the model's order, all others as they are."""
    path, reference = made(tmp_path, Kind.Q4_0)
    folder = load_model(str(path), dtype="auto", device="cpu").path
    with safe_open(folder / BLOCKS_FILE, framework="np") as file:
        assert set(file.metadata().values()) == {BLOCKS_FORMAT, "Q4_0"}
        for name in tuple(file.keys()):
            weight = gguf.quants.dequantize(file.get_tensor(name), Kind.Q4_0)
            assert np.array_equal(weight, reference.state_dict()[name].numpy()), name
