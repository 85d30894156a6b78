"""Attention over paged KV for flat ragged batches of chunks and draft trees.

`transformers` calls the function registered here once per layer with all tokens of all sequences in one row. The
batch's metadata arrives through `**kwargs`; no mask is built by the library (an attention name without a registered
mask function gets none). Keys and values are written to the cache first, then every sequence attends over its own
blocks (the SPLIT form of BASS, 2404.15778: only attention ever sees that lengths differ).

A query sees the whole committed context, the chunk tokens up to itself, and its ancestors in the draft tree. Sliding
windows compare positions, not slots: in a tree several nodes share one position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from paceline.arrays import BoolArray, IntArray
from paceline.cache.paged_kv import PagedKV

NAME = "paceline"
_FOLD_UP_TO = 32
"""Queries up to which the query heads of one KV head are stacked as rows, so that keys are read once per KV head."""

_NO_TAIL = np.empty(0, dtype=np.int64)


@dataclass(eq=False)
class SequenceAttention:
    """Where one sequence's queries stand and what they see.

    `visible[i, j]`: new token i sees key j of the last ones, which are the new tokens and possibly draft nodes already
    in the cache; None means plain causal order. Masks are built once per step and kind of layer.
    """

    start: int
    stop: int
    context_len: int
    blocks: torch.Tensor  # [num_blocks]
    positions: IntArray  # [stop - start]
    visible: BoolArray | None  # [stop - start, at least stop - start]
    tail_positions: IntArray = field(default_factory=lambda: _NO_TAIL)
    """Of the draft nodes in the cache.  # [width of visible - new tokens]"""
    _masks: dict[tuple[int | None, int, torch.dtype], torch.Tensor | None] = field(default_factory=dict)

    @property
    def num_queries(self) -> int:
        """New tokens of this sequence."""
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        """Context and new tokens."""
        return self.context_len + self.num_queries

    def mask(self, window: int | None, repeat: int, like: torch.Tensor) -> torch.Tensor | None:
        """Additive mask, rows repeated for folded heads; None if everything is visible.  # [repeat * n, keys]"""
        key = (window, repeat, like.dtype)
        if key not in self._masks:
            seen = self._seen(window)
            self._masks[key] = None if seen is None else _additive(seen, repeat, like)
        return self._masks[key]

    def _seen(self, window: int | None) -> BoolArray | None:
        n = self.num_queries
        cut = window is not None and int(self.positions.max()) >= window
        if n == 1 and not cut and self.visible is None:
            return None
        seen = np.ones((n, self.num_keys), dtype=np.bool_)
        visible = np.tri(n, dtype=np.bool_) if self.visible is None else self.visible
        seen[:, self.num_keys - visible.shape[1] :] = visible
        if window is not None and cut:
            before = np.arange(self.context_len - len(self.tail_positions))
            key_positions = np.concatenate([before, self.tail_positions, self.positions])
            seen &= key_positions[None, :] > self.positions[:, None] - window
        return seen


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """What the attention function needs of the batch: the cache, where to write, and the sequences."""

    kv: PagedKV
    slots: torch.Tensor  # [num_tokens]
    sequences: tuple[SequenceAttention, ...]
    block_weights: torch.Tensor | None = None
    """Where to add up the attention that each block of the (only) sequence gets. The KV of its tokens is in the cache
    then and is not written again.  # fp32 [blocks]"""


def _additive(seen: BoolArray, repeat: int, like: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(seen.shape, dtype=like.dtype)
    mask.masked_fill_(torch.from_numpy(~seen), float("-inf"))
    return mask.repeat(repeat, 1).to(like.device)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, kv_heads, num_tokens, head_dim]
    attention_mask: torch.Tensor | None = None,  # noqa: ARG001  the library's argument; always None here
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: AttentionMetadata | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of `transformers`' interface.  Returns [1, num_tokens, heads, head_dim]."""
    assert paged is not None, "the model was called outside Paceline's runner"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if sliding_window is None:  # Qwen2-MoE leaves it to the mask, and sets it on its sliding layers only
        sliding_window = getattr(module, "sliding_window", None)
    if paged.block_weights is None:
        paged.kv.write(layer, paged.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    else:
        _add_block_weights(query[0], layer, paged, scaling)
    outputs = []
    for sequence in paged.sequences:
        keys, values = paged.kv.gather(layer, sequence.blocks, sequence.num_keys)
        outputs.append(
            _attend(
                query[0, :, sequence.start : sequence.stop],
                keys.transpose(0, 1),
                values.transpose(0, 1),
                sequence,
                scaling,
                sliding_window,
                softcap,
            )
        )
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend(
    query: torch.Tensor,  # [heads, n, head_dim]
    keys: torch.Tensor,  # [kv_heads, num_keys, head_dim]
    values: torch.Tensor,  # [kv_heads, num_keys, head_dim]
    sequence: SequenceAttention,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:  # [n, heads, head_dim]
    heads, n, head_dim = query.shape
    kv_heads = keys.shape[0]
    groups = heads // kv_heads
    if softcap is None and n > _FOLD_UP_TO:
        mask = sequence.mask(window, 1, query)
        out = scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, scale=scaling, enable_gqa=groups > 1
        )
        return out[0].transpose(0, 1)
    folded = query.reshape(kv_heads, groups * n, head_dim)
    mask = sequence.mask(window, groups, query)
    if softcap is None:
        out = scaled_dot_product_attention(folded[None], keys[None], values[None], attn_mask=mask, scale=scaling)[0]
    else:
        out = _soft_capped(folded, keys, values, mask, scaling or head_dim**-0.5, softcap)
    return out.reshape(heads, n, head_dim).transpose(0, 1)


def _add_block_weights(query: torch.Tensor, layer: int, paged: AttentionMetadata, scaling: float | None) -> None:
    """Add one layer's attention by block.  query [heads, n, head_dim]"""
    assert paged.block_weights is not None
    (sequence,) = paged.sequences
    keys, _ = paged.kv.gather(layer, sequence.blocks, sequence.num_keys)
    kv_heads, size = keys.shape[1], paged.kv.block_size
    folded = query.reshape(kv_heads, -1, query.shape[-1])
    weights = torch.zeros(len(keys), dtype=torch.float32, device=keys.device)
    for head in range(kv_heads):  # one at a time, since scores of a long context take room
        scores = torch.matmul(folded[head], keys[:, head].T).float() * (scaling or query.shape[-1] ** -0.5)
        mask = sequence.mask(None, query.shape[0] // kv_heads, scores)
        weights += torch.softmax(scores if mask is None else scores + mask, dim=-1).sum(dim=0)
    padded = torch.nn.functional.pad(weights, (0, -len(weights) % size))
    paged.block_weights.add_(padded.view(-1, size).sum(dim=1))


def _soft_capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores pass through `cap * tanh(score / cap)` (Gemma 2), which SDPA does not offer."""
    scores = torch.matmul(query, keys.transpose(1, 2)) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, values)


transformers.AttentionInterface.register(NAME, paged_attention)
