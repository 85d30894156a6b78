"""A `transformers` decoder of the Llama family as one native call a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.cache.paged_kv import slots_of
from paceline.model.head_subset import SubsetHead
from paceline.model.native.attention import GROUP, WAVE
from paceline.model.native.attention_kernels import TOGETHER
from paceline.model.native.compiling import announced
from paceline.model.native.forward import ALONE, ARGUMENTS, FIRST_OF_GROUP, LATER_OF_GROUP, forward_address
from paceline.model.native.linear import described
from paceline.model.native.packed import WORDS, pack
from paceline.model.native.team import team
from paceline.model.native.tiles import BLOCK
from paceline.model.quantized_embedding import QuantizedEmbedding
from paceline.model.tiled_linear import LANES, TiledLinear

if TYPE_CHECKING:
    from paceline.cache.paged_kv import PagedKV
    from paceline.model.path import ForwardPath
    from paceline.model.runner import ForwardBatch

_FAMILIES = ("llama", "qwen2", "qwen3")
_ROTARY = ("default", "linear", "llama3")
"""Kinds of rotary embedding whose angles do not depend on the length of the context."""
_ROWS = 256
"""Rows that pass through all layers together; more go one group after the other, which changes no bit."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def runs_natively(model: Any) -> bool:
    """Whether `NativeDecoder` computes this model."""
    config: Any = model.config
    if getattr(config, "model_type", None) not in _FAMILIES or config.hidden_act != "silu":
        return False
    if getattr(config, "use_sliding_window", False) or config.rope_parameters.get("rope_type") not in _ROTARY:
        return False
    layers = [_linears(layer) for layer in model.model.layers]
    head, _ = _head(model)
    if not all(isinstance(module, TiledLinear) for linears in layers for module in (*linears, head)):
        return False
    size = layers[0][0].out_features // config.num_attention_heads
    if size % LANES or size * config.num_attention_heads % BLOCK:
        return False
    biased = any(module.bias is not None for linears in layers for module in (*linears[3:], head))
    return not biased and all(module.out_features % LANES == 0 for linears in layers for module in linears)


def _linears(layer: Any) -> list[Any]:
    """The seven matrices of a layer, as the native forward orders them."""
    return [getattr(layer.self_attn, name) for name in _ATTENTION] + [getattr(layer.mlp, name) for name in _MLP]


def _head(model: Any) -> tuple[Any, torch.Tensor | None]:
    """The head, and the tokens it knows if those are not all."""
    head = model.get_output_embeddings()
    return (head.rows, head.ids) if isinstance(head, SubsetHead) else (head, None)


class NativeDecoder:
    """Runs a model's layers and head.

    Args:
        model: one that `runs_natively`; its weights are used where they lie.
        kv: its cache, in fp32.
    """

    def __init__(self, model: Any, kv: PagedKV) -> None:
        self._model, self._kv = model, kv
        body, config = model.model, model.config
        layers = list(body.layers)
        self._head, self._known = _head(model)
        self._vocab_size = config.vocab_size
        linears = [linear for layer in layers for linear in _linears(layer)]
        with announced(25):
            self._weights = np.array([described(linear) for linear in (*linears, self._head)], dtype=np.int64)
            self._forward = forward_address()
        self._words = np.zeros(WORDS * ARGUMENTS, np.int64)
        self._takes_bytes, self._takes_floats = bool(self._weights[:, 1].any()), not self._weights[:, 1].all()
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self._norms = _stacked([norm.weight for norm in (*norms, body.norm)])
        attention = [layer.self_attn for layer in layers]
        own = hasattr(attention[0], "q_norm")
        heads = [norm.weight for a in attention for norm in (a.q_norm, a.k_norm)] if own else []
        self._head_norms = _stacked(heads, attention[0].head_dim)
        self._queries = attention[0].q_proj.out_features
        columns = self._queries + 2 * attention[0].k_proj.out_features
        biased = [a for a in attention if a.q_proj.bias is not None]
        self._biases = _stacked([torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]) for a in biased], columns)
        self._width, self._inner, self._columns = config.hidden_size, config.intermediate_size, columns
        self._epsilon, self._scale = np.float32(config.rms_norm_eps), np.float32(attention[0].scaling)
        self._group = self._queries // attention[0].k_proj.out_features
        self._cosines = self._sines = np.empty((0, 0), np.float32)
        self._scratch: dict[str, np.ndarray] = {}
        self._paths: dict[ForwardPath | None, np.ndarray] = {None: _steps([(i,) for i in range(len(layers))])}

    def run(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the batch and write its KV.

        Returns:
            Logits and last hidden states of `batch.logit_rows`.  # [R, V], [R, D]
        """
        rows = _Rows(batch, self._kv)
        wanted = np.asarray(batch.logit_rows, dtype=np.int64)
        ids = np.array([t for s in batch.sequences for t in s.token_ids], dtype=np.int64)
        self._rotary(int(rows.positions.max()) + 1)
        steps = self._path(batch.path)
        if len(ids) <= _ROWS:
            logits, hidden = self._part(rows, slice(0, len(ids)), ids, wanted, steps)
            return self._all_tokens(logits[:, : self._head.out_features]), hidden
        logits = torch.empty(len(wanted), self._head.tiles * LANES)
        hidden = torch.empty(len(wanted), self._width)
        for start in range(0, len(ids), _ROWS):
            part = slice(start, min(start + _ROWS, len(ids)))
            here = np.flatnonzero((wanted >= part.start) & (wanted < part.stop))
            at = torch.from_numpy(here)
            logits[at], hidden[at] = self._part(rows, part, ids[part], wanted[here] - part.start, steps)
        return self._all_tokens(logits[:, : self._head.out_features]), hidden

    def _all_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Minus infinity for what a cut head does not know."""
        if self._known is None:
            return logits
        every = torch.full((len(logits), self._vocab_size), float("-inf"))
        return every.index_copy_(1, self._known, logits)

    def _path(self, path: ForwardPath | None) -> np.ndarray:
        if path not in self._paths:
            assert path is not None
            self._paths[path] = _steps(path.groups)
        return self._paths[path]

    def _part(
        self, rows: _Rows, part: slice, ids: np.ndarray, wanted: np.ndarray, steps: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(ids)
        widest = max(self._width, self._inner, self._queries)
        h = self._embedded(ids)
        x = self._room("x", count * widest).reshape(count, widest)
        numbers = max(count, len(wanted)) * widest // BLOCK
        sums = self._room("sums", numbers if self._takes_floats else 0)
        rounded = self._room("rounded", max(count, len(wanted)) * widest if self._takes_bytes else 0, np.int8)
        rounded = rounded.reshape(-1, widest)
        scales = self._room("scales", 2 * numbers if self._takes_bytes else 0)
        qkv = self._room("qkv", count * self._columns).reshape(count, self._columns)
        both = self._room("both", count * 2 * self._inner).reshape(count, 2 * self._inner)
        longest = -(-rows.longest // TOGETHER) * TOGETHER
        heads = self._kv.slots.shape[3]
        scores = self._room("scores", WAVE * heads * self._group * longest).reshape(WAVE, heads, self._group, longest)
        logits = torch.empty(len(wanted), self._head.tiles * LANES)
        hidden = torch.empty(len(wanted), self._width)
        visible_at = rows.visible_at[part.start : part.stop + 1]
        entering = count * self._width if steps[:, 1].any() else 0
        arguments = (
            self._weights,
            self._norms,
            self._head_norms,
            self._biases,
            self._cosines,
            self._sines,
            float(self._epsilon),
            float(self._scale),
            self._kv.slots.numpy(),
            rows.slots[part],
            rows.positions[part],
            rows.seen[part],
            rows.visible,
            visible_at,
            rows.keys,
            rows.keys_at[part],
            wanted,
            h,
            x,
            sums,
            rounded,
            scales,
            qkv,
            both,
            scores,
            np.empty((count + 1, 2), np.int64),
            np.empty(count, np.int64),
            np.empty((count, -(-rows.tail // TOGETHER) * TOGETHER), np.int64),
            hidden.numpy(),
            logits.numpy(),
            steps,
            self._room("entry", entering).reshape(-1, self._width),
        )
        pack(arguments, self._words)
        team().run(self._forward, self._words)
        return logits, hidden

    def _embedded(self, ids: np.ndarray) -> np.ndarray:
        table = self._model.get_input_embeddings()
        if isinstance(table, QuantizedEmbedding):
            return table.look_up(ids)
        found: np.ndarray = table(torch.from_numpy(ids)).float().contiguous().numpy()
        return found

    def _room(self, name: str, size: int, dtype: type[np.generic] = np.float32) -> np.ndarray:
        """Scratch that stays between steps."""
        found = self._scratch.get(name)
        if found is None or found.size < size:
            found = self._scratch[name] = np.empty(size, dtype)
        return found[:size]

    def _rotary(self, positions: int) -> None:
        if positions <= len(self._cosines):
            return
        count = 1 << max(positions - 1, 255).bit_length()
        with torch.inference_mode():
            cosine, sine = self._model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(count)[None])
        half = cosine.shape[-1] // 2
        self._cosines, self._sines = (t[0, :, :half].float().contiguous().numpy() for t in (cosine, sine))


class _Rows:
    """What the native forward needs to know of every row of a batch."""

    def __init__(self, batch: ForwardBatch, kv: PagedKV) -> None:
        slot_bytes = kv.slots[0, 0, 0].nbytes
        counts = [len(s.token_ids) for s in batch.sequences]
        ends = [s.context_len + n for s, n in zip(batch.sequences, counts, strict=True)]
        total = sum(counts)
        self.longest = max(1, *ends)
        self.positions, self.slots, self.seen, self.keys_at = (np.empty(total, np.int64) for _ in range(4))
        self.visible_at = np.zeros(total + 1, np.int64)
        self.keys = np.empty(sum(ends), np.int64)
        visible, widest, row, key = [], 0, 0, 0
        for s, n, end in zip(batch.sequences, counts, ends, strict=True):
            mine, slots = slice(row, row + n), slots_of(s.blocks, kv.block_size, 0, end)
            self.positions[mine], self.slots[mine], self.keys_at[mine] = s.positions, slots[s.context_len :], key
            self.keys[key : key + end] = slots
            if s.visible is None:
                self.seen[mine] = np.arange(s.context_len + 1, end + 1)
            else:
                width = s.visible.shape[1]
                self.seen[mine], self.visible_at[row + 1 : row + n + 1] = end - width, width
                widest = max(widest, width)
                visible.append(np.ascontiguousarray(s.visible).reshape(-1))
            row, key = row + n, key + end
        self.tail = TOGETHER - 1 + GROUP - 1 + widest
        """What a row may see beside the keys that it and those next to it have in common."""
        self.keys *= slot_bytes
        self.visible = np.concatenate(visible) if visible else _NONE_VISIBLE
        if visible:
            np.cumsum(self.visible_at, out=self.visible_at)


def _steps(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """A path as the native forward reads it.  # [P, 2]"""
    steps = []
    for group in groups:
        for place, layer in enumerate(group):
            later = LATER_OF_GROUP if place else FIRST_OF_GROUP
            steps.append((layer, ALONE if len(group) == 1 else later))
    return np.array(steps, dtype=np.int64)


_NONE_VISIBLE = np.zeros(0, dtype=np.bool_)


def _stacked(tensors: list[torch.Tensor], width: int = 0) -> np.ndarray:
    """Vectors as the rows of a matrix, of none if there are none."""
    if not tensors:
        return np.empty((0, width), np.float32)
    found: np.ndarray = torch.stack([t.detach().float() for t in tensors]).contiguous().numpy()
    return found
