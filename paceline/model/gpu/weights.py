"""The weights of a Llama-like `transformers` decoder as the kernels want them: fused, and used where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROTARY = ("default", "linear", "llama3")
"""Kinds of rotary embedding whose angles do not depend on the length of the context."""
_LEAST_HEAD = 16
"""The least head that tensor cores take."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    head_norms: torch.Tensor | None  # [heads + kv_heads, head_dim], of queries and keys
    o: torch.Tensor  # [hidden, heads * head_dim]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * inner, hidden]
    down: torch.Tensor  # [hidden, inner]
    scale: float
    window: int | None


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """All of a model."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab, hidden]
    cosines: torch.Tensor  # fp32 [positions, head_dim]
    sines: torch.Tensor  # fp32 [positions, head_dim]
    epsilon: float
    heads: int
    kv_heads: int
    head_dim: int
    inner: int


def is_llama_like(model: Any) -> bool:
    """Whether `fuse_weights` knows this model."""
    config: Any = model.config
    if getattr(config, "model_type", None) not in _FAMILIES or config.hidden_act != "silu":
        return False
    rotary = config.rope_parameters
    if rotary.get("rope_type") not in _ROTARY or rotary.get("partial_rotary_factor", 1.0) != 1.0:
        return False
    if type(model.get_input_embeddings()) is not torch.nn.Embedding:
        return False
    layers = list(model.model.layers)
    linears = [linear for layer in layers for linear in _linears(layer)]
    head = model.get_output_embeddings()
    if not all(type(module) is torch.nn.Linear for module in (*linears, head)):
        return False
    biased = any(module.bias is not None for layer in layers for module in _linears(layer)[3:])
    head_dim = layers[0].self_attn.head_dim
    contiguous = all(module.weight.is_contiguous() for module in (*linears, head))
    return contiguous and not biased and head.bias is None and head_dim >= _LEAST_HEAD and not head_dim & (head_dim - 1)


def _linears(layer: Any) -> list[Any]:
    a, m = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]


@torch.inference_mode()
def fuse_weights(model: Any, positions: int) -> DecoderWeights:
    """Fuse what is multiplied with the same rows; the model's own modules become views of it, so nothing is doubled.

    Args:
        model: one that `is_llama_like`.
        positions: how many the tables of the rotary embedding hold.
    """
    body, config = model.model, model.config
    layers = tuple(_layer(layer) for layer in body.layers)
    attention = body.layers[0].self_attn
    embedding = model.get_input_embeddings().weight
    at = torch.arange(positions, device=embedding.device)[None]
    cosines, sines = body.rotary_emb(torch.zeros(1, dtype=torch.float32, device=embedding.device), at)
    return DecoderWeights(
        embedding=embedding.detach(),
        layers=layers,
        norm=body.norm.weight.detach(),
        head=model.get_output_embeddings().weight.detach(),
        cosines=cosines[0].float().contiguous(),
        sines=sines[0].float().contiguous(),
        epsilon=float(config.rms_norm_eps),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        inner=config.intermediate_size,
    )


def _layer(layer: Any) -> LayerWeights:
    a, m = layer.self_attn, layer.mlp
    own = hasattr(a, "q_norm")
    heads, kv_heads = (p.out_features // a.head_dim for p in (a.q_proj, a.k_proj))
    norms = [a.q_norm.weight] * heads + [a.k_norm.weight] * kv_heads if own else []
    biases = [p.bias for p in (a.q_proj, a.k_proj, a.v_proj) if p.bias is not None]
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=_fused([a.q_proj, a.k_proj, a.v_proj]),
        qkv_bias=torch.cat(biases) if biases else None,
        head_norms=torch.stack(norms) if own else None,
        o=a.o_proj.weight.detach(),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_fused([m.gate_proj, m.up_proj]),
        down=m.down_proj.weight.detach(),
        scale=float(a.scaling),
        # Mistral's layers leave it to their config; elsewhere a config may name one that its layers do not use.
        window=getattr(a, "sliding_window", a.config.sliding_window if a.config.model_type == "mistral" else None),
    )


def _fused(linears: list[Any]) -> torch.Tensor:
    whole = _fused_before(linears)
    if whole is not None:
        return whole
    whole = torch.cat([linear.weight for linear in linears])
    start = 0
    for linear in linears:
        linear.weight = torch.nn.Parameter(whole[start : start + linear.out_features], requires_grad=False)
        start += linear.out_features
    return whole


def _fused_before(linears: list[Any]) -> torch.Tensor | None:
    """What an earlier runner of the same model made: its weights are views of one tensor, one behind the other."""
    first: torch.Tensor = linears[0].weight
    rows = 0
    for linear in linears:
        weight = linear.weight
        behind = weight.storage_offset() == first.storage_offset() + rows * first.shape[1]
        if weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or not behind:
            return None
        rows += linear.out_features
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
