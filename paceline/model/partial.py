"""A `ForwardPath` through the modules of a `transformers` model: the list of layers is exchanged for one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from paceline.model.attention import paged_attention
from paceline.model.path import ForwardPath


class LayerGroup(torch.nn.Module):
    """Layers whose attentions start from the same state.

    Their query, key and value projections are one product where all of them are plain matrices: the weights of the
    norms before them are multiplied into a copy of theirs.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self._layers = tuple(layers)  # not registered: they are the model's
        self._projections = _stacked(layers)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **options: Any
    ) -> torch.Tensor:
        """Hidden states after the group.  # [1, tokens, hidden]"""
        if self._projections is None:
            options["position_embeddings"] = position_embeddings
            attended = [layer.self_attn(layer.input_layernorm(hidden_states), **options)[0] for layer in self._layers]
        else:
            attended = self._attend(hidden_states, position_embeddings, options)
        for layer, added in zip(self._layers, attended, strict=True):
            hidden_states = hidden_states + added
            hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        return hidden_states

    def _attend(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], options: dict[str, Any]
    ) -> list[torch.Tensor]:
        assert self._projections is not None
        weight, bias = self._projections
        norm = self._layers[0].input_layernorm
        scale = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
        every = linear((hidden.float() * scale).to(hidden.dtype), weight, bias).chunk(len(self._layers), dim=-1)
        return [_one(layer.self_attn, qkv, rotary, options) for layer, qkv in zip(self._layers, every, strict=True)]


def _one(
    attention: Any, qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], options: dict[str, Any]
) -> torch.Tensor:
    """A layer's attention over projected rows.  # [1, tokens, hidden]"""
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    parts = torch.split(qkv, [queries, keys, keys], dim=-1)
    q, k, v = (part.view(*part.shape[:-1], -1, attention.head_dim) for part in parts)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cosine, sine = (part[:, None] for part in rotary)
    q, k = (x * cosine + _turned(x) * sine for x in (q.transpose(1, 2), k.transpose(1, 2)))
    of_model = attention.config.sliding_window if attention.config.model_type == "mistral" else None
    window = getattr(attention, "sliding_window", of_model)
    out, _ = paged_attention(
        attention, q, k, v.transpose(1, 2), scaling=attention.scaling, sliding_window=window, paged=options["paged"]
    )
    added: torch.Tensor = attention.o_proj(out.flatten(2))
    return added


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@torch.inference_mode()
def _stacked(layers: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The projections of all layers over the normalised state, before norm weights; None where they are packed."""
    rows, biases = list[torch.Tensor](), list[torch.Tensor]()
    for layer in layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            module = getattr(layer.self_attn, name)
            if type(module) is not torch.nn.Linear:
                return None
            rows.append(module.weight * layer.input_layernorm.weight)
            if module.bias is not None:
                biases.append(module.bias)
    return torch.cat(rows), torch.cat(biases) if biases else None


class PartialModel:
    """Runs a model along paths; groups are put together once.

    Args:
        model: of one of `path.FAMILIES`.
    """

    def __init__(self, model: Any) -> None:
        self._body = model.model
        self._groups: dict[tuple[int, ...], LayerGroup] = {}
        self._lists: dict[ForwardPath, torch.nn.ModuleList] = {}

    @contextmanager
    def along(self, path: ForwardPath | None) -> Iterator[None]:
        """The model runs only these layers meanwhile."""
        if path is None:
            yield
            return
        whole = self._body.layers
        if path not in self._lists:
            self._lists[path] = torch.nn.ModuleList(self._module(whole, group) for group in path.groups)
        self._body.layers = self._lists[path]
        try:
            yield
        finally:
            self._body.layers = whole

    def _module(self, layers: Any, group: tuple[int, ...]) -> torch.nn.Module:
        if len(group) == 1:
            found: torch.nn.Module = layers[group[0]]
            return found
        if group not in self._groups:
            self._groups[group] = LayerGroup([layers[i] for i in group])
        return self._groups[group]
