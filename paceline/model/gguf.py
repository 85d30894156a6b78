"""Turn a GGUF file into a checkpoint folder that `transformers` loads.

Every tensor is dequantised. The stored type is float32, which holds every dequantised value exactly; a file
whose matrices are all bf16 (or all f16) keeps that type if its norms and biases fit in it exactly. Matrices that
can run in the file's own precision are stored a second time, as they are (`convert.BLOCKS_FILE`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from paceline.errors import CorruptFileError, UnsupportedModelError
from paceline.model.convert import BLOCKS_FILE
from paceline.model.gguf_config import build_config
from paceline.model.gguf_reader import GgufFile, GgufTensor
from paceline.model.gguf_tokenizer import save_tokenizer
from paceline.model.gguf_weights import Rule, write_blocks, write_weights

_ROPE_FREQS = "rope_freqs.weight"


def convert(path: Path, folder: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Write config, weights, tokenizer and generation config of a GGUF model.

    Args:
        path: the GGUF file.
        folder: an existing empty folder.
        on_progress: called with bytes written and bytes in all after each tensor.

    Raises:
        ModelNotFoundError: the file cannot be opened.
        CorruptFileError: the file is truncated, damaged or not a GGUF model; names the file and the tensor.
        UnsupportedModelError: an architecture, tokenizer or tensor type that is not supported.
    """
    with GgufFile(path) as file:
        config = _config(file)
        rules = _rules(config)
        _check_tensors(file, rules)
        config["dtype"] = _stored_dtype(file, rules)
        ends = save_tokenizer(file.metadata, folder, path)
        ids = _token_ids(file.metadata, ends, config["vocab_size"], path)
        _write_json(folder / "config.json", config | ids)
        _write_json(folder / "generation_config.json", ids)
        write_weights(file, rules, config["dtype"], folder / "model.safetensors", on_progress)
        write_blocks(file, rules, folder / BLOCKS_FILE)


def _config(file: GgufFile) -> dict[str, Any]:
    embedding = file.tensors.get("token_embd.weight")
    freqs = file.dequantise(_ROPE_FREQS) if _ROPE_FREQS in file.tensors else None
    tied = "output.weight" not in file.tensors
    # Architecture errors come first: they explain missing tensors.
    config = build_config(file.metadata, embedding.shape[0] if embedding else 1, tied, freqs, file.path)
    if config["num_hidden_layers"] > len(file.tensors):
        raise CorruptFileError(
            f"claims {config['num_hidden_layers']} layers and has {len(file.tensors)} tensors.",
            field=str(file.path),
        )
    return config


def _rules(config: dict[str, Any]) -> list[Rule]:
    """All tensors of the checkpoint, in order."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, head_dim = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    arch = config["model_type"]
    rules = [Rule("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(config["num_hidden_layers"]):
        parts: list[tuple[str, str, tuple[int, ...]]] = [
            ("attn_norm.weight", "input_layernorm.weight", (hidden,)),
            ("attn_q.weight", "self_attn.q_proj.weight", (heads * head_dim, hidden)),
            ("attn_k.weight", "self_attn.k_proj.weight", (kv_heads * head_dim, hidden)),
            ("attn_v.weight", "self_attn.v_proj.weight", (kv_heads * head_dim, hidden)),
            ("attn_output.weight", "self_attn.o_proj.weight", (hidden, heads * head_dim)),
            ("ffn_norm.weight", "post_attention_layernorm.weight", (hidden,)),
            ("ffn_gate.weight", "mlp.gate_proj.weight", (inner, hidden)),
            ("ffn_up.weight", "mlp.up_proj.weight", (inner, hidden)),
            ("ffn_down.weight", "mlp.down_proj.weight", (hidden, inner)),
        ]
        if arch == "qwen2":
            for short, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                parts.append((f"attn_{short}.bias", f"self_attn.{short}_proj.bias", (count * head_dim,)))
        if arch == "qwen3":
            for short in ("q", "k"):
                parts.append((f"attn_{short}_norm.weight", f"self_attn.{short}_norm.weight", (head_dim,)))
        # llama.cpp rotates adjacent pairs for llama, and only for it among these, and reorders its rows.
        order = {"attn_q.weight": heads, "attn_k.weight": kv_heads} if arch == "llama" else {}
        rules += [
            Rule(f"blk.{layer}.{source}", f"model.layers.{layer}.{target}", shape, order.get(source, 0))
            for source, target, shape in parts
        ]
    rules.append(Rule("output_norm.weight", "model.norm.weight", (hidden,)))
    if not config["tie_word_embeddings"]:
        rules.append(Rule("output.weight", "lm_head.weight", (vocab, hidden)))
    return rules


def _check_tensors(file: GgufFile, rules: list[Rule]) -> None:
    """Every tensor is there in its shape, and none is left over: a dropped bias would change the model."""
    for rule in rules:
        tensor = file.tensors.get(rule.source)
        if tensor is None:
            raise CorruptFileError(f"lacks the tensor {rule.source!r}.", field=str(file.path))
        if tensor.shape != rule.shape:
            raise CorruptFileError(
                f"tensor {rule.source!r} has shape {list(tensor.shape)}, expected {list(rule.shape)}.",
                field=str(file.path),
            )
    extra = sorted(file.tensors.keys() - {rule.source for rule in rules} - {_ROPE_FREQS})
    if extra:
        raise UnsupportedModelError(
            f"has tensors that its architecture does not use: {', '.join(extra[:5])}.", field=str(file.path)
        )


def _stored_dtype(file: GgufFile, rules: list[Rule]) -> str:
    tensors = [file.tensors[rule.source] for rule in rules]
    matrices = {tensor.kind for tensor in tensors if len(tensor.shape) > 1}
    for kind, dtype in ((Kind.BF16, "bfloat16"), (Kind.F16, "float16")):
        if matrices == {kind} and all(_fits(file, tensor, dtype) for tensor in tensors if tensor.kind != kind):
            return dtype
    return "float32"


def _fits(file: GgufFile, tensor: GgufTensor, dtype: str) -> bool:
    values = file.dequantise(tensor.name)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return bool((values.astype(np.float16).astype(np.float32) == values).all())
    return not (values.view(np.uint32) & 0xFFFF).any()


def _token_ids(metadata: dict[str, Any], ends: list[int], vocab_size: int, path: Path) -> dict[str, Any]:
    """Token ids for the configs; the tokenizer has already checked those against its vocabulary."""
    count = len(metadata["tokenizer.ggml.tokens"])
    if count > vocab_size:
        raise CorruptFileError(f"has {count} tokens and {vocab_size} embedding rows.", field=str(path))
    bos, pad = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "padding"))
    eos: int | list[int] | None = ends[0] if len(ends) == 1 else ends or None
    ids = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad if pad is not None else next(iter(ends), None),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
