"""Tiny GGUF files for tests, written by the `gguf` package from a random `transformers` model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM

LETTERS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGED = ["he", "ll", "hell", "hello", "Ġw", "12", "Ġhello"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ hello"]
THINK = ["<think>"]
TOKENS = SPECIALS + LETTERS + MERGED + THINK
TOKEN_TYPES = [3] * len(SPECIALS) + [1] * (len(LETTERS) + len(MERGED)) + [4]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 16, 96


def make_model(arch: str, *, tied: bool = False) -> Any:
    """A random two-layer model of the `transformers` architecture `arch`."""
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = AutoConfig.for_model(
        arch,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=len(TOKENS),
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # otherwise ones and zeros, which hide a mix-up
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def write_gguf(path: Path, arch: str, model: Any, kind: Kind = Kind.F32, **extra: Any) -> dict[str, torch.Tensor]:
    """Write `model` as llama.cpp's converter would; matrices are stored as `kind`.

    `extra` overrides metadata: `pre`, `arch_name`, `skip` (a tensor to leave out), `more` (writer -> None); and
    `raw`, tensors that are stored as given: {GGUF name: (bytes by row, kind)}.

    Returns:
        The weights as they are after quantisation, under their `transformers` names.
    """
    extra = {"arch_name": arch, "pre": "qwen2" if arch.startswith("qwen") else "smollm", **extra}
    writer = gguf.GGUFWriter(str(path), extra["arch_name"])
    _write_metadata(writer, extra)
    stored = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored[name] = _write_tensor(writer, arch, name, weight.float().numpy(), kind, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _write_metadata(writer: Any, extra: dict[str, Any]) -> None:
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model(extra.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(extra["pre"])
    writer.add_token_list(extra.get("tokens", TOKENS))
    writer.add_token_types(TOKEN_TYPES)
    writer.add_token_merges(extra.get("merges", MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(extra.get("add_bos", False))
    writer.add_chat_template(TEMPLATE)
    if "more" in extra:
        extra["more"](writer)


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a `transformers` weight."""
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_NAMES[part]}.{ending}"
    return f"{_NAMES[stem]}.{ending}"


def _write_tensor(
    writer: Any, arch: str, name: str, weight: np.ndarray, kind: Kind, extra: dict[str, Any]
) -> torch.Tensor:
    kind = kind if weight.ndim > 1 else Kind.F32
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0) if arch == "llama" else 0
    if heads:  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
        weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    if gguf_name(name) in extra.get("raw", {}):
        raw, kind = extra["raw"][gguf_name(name)]
    else:
        raw = gguf.quants.quantize(np.ascontiguousarray(weight), kind)
    back = gguf.quants.dequantize(raw, kind).reshape(weight.shape)
    if gguf_name(name) != extra.get("skip"):
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
    if heads:
        back = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
    return torch.from_numpy(np.array(back, dtype=np.float32))
