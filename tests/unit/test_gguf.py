"""GGUF conversion: same logits as the model that was written, and typed errors for every kind of bad file."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf_files as tiny
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError
from paceline.model.gguf import convert

IDS = torch.tensor([[3, 40, 7, 99, 2, 15, 60, 60]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    return out


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    tiny.write_gguf(path, "llama", tiny.make_model("llama"), Kind.Q8_0)
    return path.read_bytes()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False)])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_logits_are_those_of_the_dequantised_model(
    tmp_path: Path, folder: Path, arch: str, tied: bool, kind: Kind
) -> None:
    reference = tiny.make_model(arch, tied=tied)
    stored = tiny.write_gguf(tmp_path / "m.gguf", arch, reference, kind)
    reference.load_state_dict(stored, strict=False)
    convert(tmp_path / "m.gguf", folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval()), logits(reference))
    # Norms here are arbitrary float32 values, so no narrower type holds the file exactly.
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_narrow_files_stay_narrow(tmp_path: Path, folder: Path, kind: Kind, dtype: torch.dtype) -> None:
    model = tiny.make_model("llama").to(dtype).float()
    stored = tiny.write_gguf(tmp_path / "m.gguf", "llama", model, kind)
    convert(tmp_path / "m.gguf", folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == dtype
    for name, weight in stored.items():
        assert torch.equal(loaded.state_dict()[name].float(), weight), name


def test_progress_reaches_the_total(tmp_path: Path, folder: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", "llama", tiny.make_model("llama"))
    seen: list[tuple[int, int]] = []
    convert(tmp_path / "m.gguf", folder, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize(("arch", "pre"), [("llama", "smollm"), ("qwen2", "qwen2"), ("qwen3", "qwen2")])
def test_tokenizer(tmp_path: Path, folder: Path, arch: str, pre: str) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", arch, tiny.make_model(arch), pre=pre)
    convert(tmp_path / "m.gguf", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("hello hello 12<|im_end|><think>").input_ids)
    assert pieces == ["hello", "Ġhello", "Ġ", "1", "2", "<|im_end|>", "<think>"]
    assert tokenizer.decode(tokenizer("hi  there\n").input_ids) == "hi  there\n"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*tiny.SPECIALS[1:], "<|im_end|>")
    ids = tokenizer("a<|im_end|><think>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_pre_tokenizers_survive_auto_tokenizer(tmp_path: Path) -> None:
    whole, digits = ["hello", "12"], ["hello", "1", "2"]
    for arch, pre, pieces in (
        ("llama", "gpt-2", whole),
        ("llama", "llama-bpe", whole),
        ("qwen3", "llama-bpe", whole),
        ("llama", "qwen2", digits),
        ("qwen2", "qwen2", digits),
    ):
        out = tmp_path / f"{arch}-{pre}"
        out.mkdir()
        tiny.write_gguf(tmp_path / "m.gguf", arch, tiny.make_model(arch), pre=pre)
        convert(tmp_path / "m.gguf", out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.convert_ids_to_tokens(tokenizer("hello12").input_ids) == pieces, pre


@pytest.mark.parametrize(("arch", "pre"), [("llama", "smollm"), ("qwen2", "qwen2"), ("qwen3", "qwen2")])
def test_bos_is_added_where_the_file_says_so(tmp_path: Path, folder: Path, arch: str, pre: str) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", arch, tiny.make_model(arch), pre=pre, add_bos=True)
    convert(tmp_path / "m.gguf", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hello").input_ids[0] == 1
    assert len(tokenizer("hello").input_ids) == 2
    assert tokenizer("hello", add_special_tokens=False).input_ids[0] != 1


def test_llama3_rope_factors_are_recognised(tmp_path: Path, folder: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / scaled).numpy().astype(np.float32)

    def more(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    tiny.write_gguf(tmp_path / "m.gguf", "llama", tiny.make_model("llama"), more=more)
    convert(tmp_path / "m.gguf", folder)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == rope


def _sliding(writer: Any) -> None:
    writer.add_sliding_window(16)


def _experts(writer: Any) -> None:
    writer.add_expert_count(8)


def _longrope(writer: Any) -> None:
    writer.add_string("llama.rope.scaling.type", "longrope")
    writer.add_float32("llama.rope.scaling.factor", 2.0)


def _bias(writer: Any) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.ones(64, dtype=np.float32))


def _adapter(writer: Any) -> None:
    writer.add_string("general.type", "adapter")


def _integers(writer: Any) -> None:
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, dtype=np.int32))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"arch_name": "mamba"}, "mamba"),
        ({"pre": "jina-v2"}, "jina-v2"),
        ({"tokenizer": "llama"}, "'llama'"),
        ({"more": _sliding}, "sliding"),
        ({"more": _experts}, "experts"),
        ({"more": _longrope}, "longrope"),
        ({"more": _bias}, "blk.0.attn_q.bias"),
        ({"more": _adapter}, "adapter"),
        ({"more": _integers, "skip": "blk.0.attn_norm.weight"}, r"blk\.0\.attn_norm\.weight.*I32"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path: Path, folder: Path, options: dict[str, Any], word: str) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", "llama", tiny.make_model("llama"), **options)
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        convert(tmp_path / "m.gguf", folder)
    assert "m.gguf" in str(caught.value)


def test_qwen2_with_another_pre_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", "qwen2", tiny.make_model("qwen2"), pre="smollm")
    with pytest.raises(UnsupportedModelError, match="'smollm'"):
        convert(tmp_path / "m.gguf", folder)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"skip": "blk.1.ffn_up.weight"}, "blk.1.ffn_up.weight"),
        ({"merges": ["h e", "x yz"]}, "x yz"),
        ({"tokens": [*tiny.TOKENS[:-1], "a"]}, "twice"),
        ({"tokens": [*tiny.TOKENS, "extra"]}, "token_type"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, folder: Path, options: dict[str, Any], word: str) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", "llama", tiny.make_model("llama"), **options)
    with pytest.raises(CorruptFileError, match=word):
        convert(tmp_path / "m.gguf", folder)


def test_infinite_weights_are_refused(tmp_path: Path, folder: Path) -> None:
    model = tiny.make_model("llama")
    model.model.norm.weight[3] = float("inf")
    tiny.write_gguf(tmp_path / "m.gguf", "llama", model)
    with pytest.raises(CorruptFileError, match=r"output_norm\.weight"):
        convert(tmp_path / "m.gguf", folder)


def try_convert(data: bytes, tmp_path: Path) -> str:
    """Convert `data`; what happened, which must be success or a typed error that names the file."""
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(data)
    out = tmp_path / "fuzz-out"
    out.mkdir(exist_ok=True)
    try:
        convert(path, out)
    except (CorruptFileError, UnsupportedModelError) as error:
        return type(error).__name__ if "fuzz.gguf" in str(error) else f"no file named: {error}"
    return "fine"


def test_every_truncation_is_refused(tmp_path: Path, good_bytes: bytes) -> None:
    rng = random.Random(0)
    end = len(good_bytes) - 32  # up to 31 bytes of padding may go without harm
    cuts = [*range(64), *rng.sample(range(end), 120), end]
    for cut in cuts:
        assert try_convert(good_bytes[:cut], tmp_path) == "CorruptFileError", cut


def test_flipped_bytes_never_crash(tmp_path: Path, good_bytes: bytes) -> None:
    rng = random.Random(1)
    header = good_bytes.index(b"token_embd.weight") + 2000
    outcomes = set()
    for trial in range(150):
        data = bytearray(good_bytes)
        for _ in range(rng.choice((1, 1, 8))):
            data[rng.randrange(header if trial % 5 else len(data))] = rng.randrange(256)
        outcomes.add(try_convert(bytes(data), tmp_path))
    assert {"fine", "CorruptFileError"} <= outcomes <= {"fine", "CorruptFileError", "UnsupportedModelError"}


@pytest.mark.parametrize("value", [1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_absurd_counts_are_refused_at_once(tmp_path: Path, good_bytes: bytes, value: int) -> None:
    """Counts of tensors, of metadata, of array entries, lengths of strings, dimensions and offsets."""
    number = struct.pack("<Q", value)
    places = [8, 16, 24]
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"):
        places.append(good_bytes.index(key) + len(key) + 8)
    name = good_bytes.index(b"token_embd.weight") + len(b"token_embd.weight")
    places += [name + 4, name + 12, name + 24]
    for place in places:
        data = good_bytes[:place] + number + good_bytes[place + 8 :]
        assert try_convert(data, tmp_path) == "CorruptFileError", place


def test_foreign_files(tmp_path: Path, folder: Path) -> None:
    for content in (b"", b"GGUF", b"PK\x03\x04" + bytes(100), b"{}", b"\x00" * 4096):
        assert try_convert(content, tmp_path) == "CorruptFileError"
    for version in (1, 4, 0x03000000):
        content = b"GGUF" + struct.pack("<IQQ", version, 0, 0)
        assert try_convert(content, tmp_path) == "UnsupportedModelError"
    with pytest.raises(ModelNotFoundError):
        convert(tmp_path / "absent.gguf", folder)
