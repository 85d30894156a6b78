"""Loading: what comes back, and one clear refusal for everything that would not run exactly."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files as tiny
import pytest
import torch
from fakes import ARCHITECTURES, make_config, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from paceline.errors import ConfigError, CorruptFileError, ModelNotFoundError, UnsupportedModelError
from paceline.model import loader
from paceline.model.checks import PROVED, max_positions
from paceline.model.gguf import convert
from paceline.model.gguf_config import build_config
from paceline.model.loader import check_architecture, load_model, resolve_device, resolve_dtype


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.write_gguf(folder / "m.gguf", "llama", tiny.make_model("llama"))
    (folder / "model").mkdir()
    convert(folder / "m.gguf", folder / "model")
    return folder / "model"


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A fresh copy of a small checkpoint, to be damaged."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(checkpoint: Path, **changes: torch.Tensor | None) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    for name, value in changes.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, path, metadata={"format": "pt"})


def test_load(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(str(made), dtype="float32", device="cpu")
    assert (loaded.name, loaded.path, loaded.max_model_len) == (str(made), made, 64)
    assert loaded.dtype is loaded.model.dtype is torch.float32
    assert loaded.device == torch.device("cpu")
    assert loaded.eos_token_ids == (2,)
    assert loaded.config.model_type == "llama"
    assert loaded.config._attn_implementation == "paceline"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer("hello").input_ids == [tiny.TOKENS.index("hello")]
    assert capfd.readouterr() == ("", "")


def test_dtype_is_applied(made: Path) -> None:
    assert load_model(str(made), dtype="bfloat16", device="cpu").model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(7, 5, (2, 7)), ([7, 9, 2], 5, (2, 7, 9)), (None, 5, (2, 5)), (None, None, (2,))],
)
def test_eos_token_ids(checkpoint: Path, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    edit_json(checkpoint / "config.json", eos_token_id=config)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_model(str(checkpoint), dtype="float32", device="cpu").eos_token_ids == expected


def test_resolve_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "gpu", "mps", "cuda:x", ""):
        with pytest.raises(ConfigError, match="device"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="1 CUDA"):
        resolve_device("cuda:1")


def test_resolve_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("float32", cpu) is torch.float32
    assert resolve_dtype("bfloat16", cpu) is torch.bfloat16
    with pytest.raises(ConfigError, match="float16"):
        resolve_dtype("float16", cpu)
    for flags, expected in (
        ("avx512f avx512_bf16 sha_ni", torch.bfloat16),
        ("amx_tile amx_bf16", torch.bfloat16),
        ("avx2 avx512f", torch.float32),
    ):
        text = f"processor : 0\nmodel name : x\nflags\t\t: fpu {flags} rdpid\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, _text=text, **__: _text)
        assert resolve_dtype("auto", cpu) is expected


def config_of(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **changes)


@pytest.mark.parametrize("kind", PROVED)
def test_proved_architectures_pass(kind: str) -> None:
    check_architecture(config_of(kind))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (config_of("gpt_neox"), "proved so far"),
        (config_of("t5"), "encoder-decoder"),
        (config_of("llava"), "multimodal"),
        (config_of("gemma3"), "multimodal"),
        (config_of("gemma3_text", use_bidirectional_attention=True), "attend to later"),
        (config_of("llama", is_causal=False), "attend to later"),
        (config_of("gpt2", add_cross_attention=True), "cross-attention"),
        (config_of("gpt2", architectures=["GPT2DoubleHeadsModel"]), "GPT2DoubleHeadsModel"),
        (config_of("llama", architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (config_of("llama", quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
        (config_of("qwen2", quantization_config={}), "unnamed"),
        (
            config_of("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "dynamic",
        ),
        (SimpleNamespace(model_type="llama", max_position_embeddings=None), "maximum length"),
    ],
)
def test_refused_architectures(config: Any, word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        check_architecture(config)


def test_longrope_is_capped() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    rope |= {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 32.0}
    config = config_of("llama", max_position_embeddings=131072, rope_parameters=rope, head_dim=64)
    check_architecture(config)
    assert max_positions(config) == 4096
    assert max_positions(config_of("llama", max_position_embeddings=77)) == 77


def test_lengths_under_other_names() -> None:
    assert max_positions(config_of("gpt2", n_positions=77)) == 77
    # OPT's table has two rows more, which no position reaches.
    assert max_positions(config_of("opt", max_position_embeddings=77)) == 77
    longrope = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}  # as published
    assert max_positions(config_of("phi3", max_position_embeddings=131072, rope_scaling=longrope)) == 4096
    assert max_positions(config_of("phi3", max_position_embeddings=8192)) == 8192


def save(architecture: str, folder: Path) -> torch.nn.Module:
    """A checkpoint of a random tiny model."""
    model = make_model(make_config(architecture), attention="eager")
    model.save_pretrained(folder)  # type: ignore[operator]
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_read_back(architecture: str, tmp_path: Path) -> None:
    saved = save(architecture, tmp_path).state_dict()
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu")
    found = loaded.model.state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], weight) for name, weight in saved.items())
    assert loaded.max_model_len == 512


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_old_gpt2_checkpoints(prefix: str, tmp_path: Path) -> None:
    """They hold the body alone, and the causal masks of each layer."""
    saved = save("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {
        prefix + name.removeprefix("transformer."): w for name, w in load_file(path).items() if "lm_head" not in name
    }
    weights |= {
        f"{prefix}h.0.attn.bias": torch.ones(1, 1, 512, 512),
        f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    save_file(weights, path, metadata={"format": "pt"})
    found = load_model(str(tmp_path), dtype="float32", device="cpu").model
    assert torch.equal(found.transformer.h[2].mlp.c_fc.weight, saved.transformer.h[2].mlp.c_fc.weight)
    assert torch.equal(found.lm_head.weight, saved.transformer.wte.weight)
    save_file(weights | {f"{prefix}h.0.attn.c_attn.scale": torch.ones(96)}, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"c_attn\.scale"):
        load_model(str(tmp_path), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"3.gate_proj.weight": None}, CorruptFileError),
        ({f"5.{name}_proj.weight": None for name in ("gate", "up", "down")}, CorruptFileError),
        ({f"{i}.down_proj.weight": None for i in range(6)}, CorruptFileError),
        ({"3.gate_proj.weight": torch.ones(25, 32)}, CorruptFileError),
        ({"3.gate_proj.bias": torch.ones(24)}, UnsupportedModelError),
    ],
)
@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe"])
def test_damaged_experts(
    architecture: str, change: dict[str, torch.Tensor | None], error: type[Exception], tmp_path: Path
) -> None:
    save(architecture, tmp_path)
    edit_weights(tmp_path, **{f"model.layers.0.mlp.experts.{name}": value for name, value in change.items()})
    with pytest.raises(error):
        load_model(str(tmp_path), dtype="float32", device="cpu")


PHI3 = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("repository", ["", "microsoft/Phi-3-mini-4k-instruct--"])
def test_code_that_transformers_took_over_is_never_run(repository: str, trust: bool, tmp_path: Path) -> None:
    """Published Phi-3 checkpoints name their own copy of the modelling code."""
    save("phi3", tmp_path)
    for name in ("configuration_phi3.py", "modeling_phi3.py"):
        (tmp_path / name).write_text("raise SystemExit('ran')")
    code = {kind: repository + name for kind, name in PHI3.items()} | {"AutoTokenizer": "Xenova/gpt-4o"}
    edit_json(tmp_path / "config.json", auto_map=code)
    model = load_model(str(tmp_path), dtype="float32", device="cpu", trust_remote_code=trust).model
    assert type(model).__module__ == "transformers.models.phi3.modeling_phi3"
    edit_json(tmp_path / "config.json", auto_map=code | {"AutoModelForCausalLM": "modeling_phi3.Other"})
    with pytest.raises(UnsupportedModelError, match="trust_remote_code"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "fix"),
    [("gemma3", "safetensors"), ("phi3", "safetensors"), ("qwen3moe", "safetensors"), ("mamba", "")],
)
def test_gguf_of_other_families_is_refused(architecture: str, fix: str) -> None:
    metadata = {"general.architecture": architecture}
    with pytest.raises(UnsupportedModelError, match=rf"'{architecture}'.*llama, qwen2, qwen3") as refusal:
        build_config(metadata, 96, False, None, Path("m.gguf"))
    assert fix in (refusal.value.fix or "")
    assert (refusal.value.fix is None) == (fix == "")


def test_missing_weights(checkpoint: Path) -> None:
    edit_weights(checkpoint, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(CorruptFileError, match=r"missing.*layers\.1\.mlp\.up_proj"):
        load_model(str(checkpoint), dtype="float32", device="cpu")


def test_mismatched_weights(checkpoint: Path) -> None:
    edit_weights(checkpoint, **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(CorruptFileError):
        load_model(str(checkpoint), dtype="float32", device="cpu")


def test_stray_weights(checkpoint: Path) -> None:
    edit_weights(checkpoint, **{"v_head.summary.weight": torch.ones(1), "model.rotary_emb.inv_freq": torch.ones(8)})
    load_model(str(checkpoint), dtype="float32", device="cpu")
    edit_weights(checkpoint, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.bias"):
        load_model(str(checkpoint), dtype="float32", device="cpu")


def test_truncated_weights(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    for size in (0, 5, 1000, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
            load_model(str(checkpoint), dtype="float32", device="cpu")


def test_missing_shard(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match=r"model-2\.safetensors"):
        load_model(str(checkpoint), dtype="float32", device="cpu")


def test_pickled_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pickled.*safetensors"):
        load_model(str(checkpoint))


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="weights"):
        load_model(str(checkpoint))


def test_adapter(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedModelError, match="LORA adapter"):
        load_model(str(checkpoint))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code(checkpoint: Path, name: str) -> None:
    edit_json(checkpoint / name, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModelError, match="trust_remote_code"):
        load_model(str(checkpoint))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"x"', '{"model_type": "llama", "hidden_size": "many"}', "[" * 9999]
)
def test_damaged_config(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        load_model(str(checkpoint))


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "model": {"type": "Alien"}}'])
def test_damaged_tokenizer(checkpoint: Path, content: str) -> None:
    (checkpoint / "tokenizer.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json"):
        load_model(str(checkpoint))


def test_verbosity_is_restored(made: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    load_model(str(made), dtype="float32", device="cpu")
    assert logging.get_verbosity() == before
    assert AutoTokenizer.from_pretrained(made).eos_token == "<|im_end|>"
    assert loader.__all__
