"""The layers and the head of a Llama-like decoder, six to eight kernels a layer, over buffers that never move.

Nothing here allocates or asks the host for anything, so a CUDA graph can record it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.cache.paged_kv import PagedKV
from paceline.model.gpu.tiles import SOME, tile_for
from paceline.model.gpu.weights import DecoderWeights, LayerWeights
from paceline.model.kernels.attend import Partials, attend
from paceline.model.kernels.batch import AttentionBatch
from paceline.model.kernels.embed import embed
from paceline.model.kernels.gate import apply_gate
from paceline.model.kernels.kv_write import rope_write_kv
from paceline.model.kernels.norms import rms_norm
from paceline.model.kernels.products import product
from paceline.model.path import ForwardPath


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """Rows between kernels; a step uses the first ones."""

    hidden: torch.Tensor  # [tokens, hidden]
    normed: torch.Tensor  # [tokens, hidden]
    qkv: torch.Tensor  # [tokens, (heads + 2 * kv_heads) * head_dim]
    attended: torch.Tensor  # [tokens, heads, head_dim]
    both: torch.Tensor  # [tokens, 2 * inner]
    gated: torch.Tensor  # [tokens, inner]
    entry: torch.Tensor  # [tokens, hidden], where a group of layers enters
    last: torch.Tensor  # [rows, hidden]
    logits: torch.Tensor  # fp32 [rows, vocab]
    splits: torch.Tensor
    """Results of attention over splits of the keys, however many rows and splits share it.  # fp32 [any]"""

    @staticmethod
    def empty(weights: DecoderWeights, tokens: int, rows: int, split_bytes: int) -> Scratch:
        """Memory for so many tokens, rows of logits, and bytes of attention over splits of the keys."""
        like = weights.embedding
        width = like.shape[1]

        def room(*shape: int) -> torch.Tensor:
            # Padding rows go through what is left in it: numbers must stay finite, for speed and for warnings.
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        return Scratch(
            hidden=room(tokens, width),
            normed=room(tokens, width),
            qkv=room(tokens, (weights.heads + 2 * weights.kv_heads) * weights.head_dim),
            attended=room(tokens, weights.heads, weights.head_dim),
            both=room(tokens, 2 * weights.inner),
            gated=room(tokens, weights.inner),
            entry=room(tokens, width),
            last=room(rows, width),
            logits=torch.empty(rows, weights.head.shape[0], dtype=torch.float32, device=like.device),
            splits=torch.empty(split_bytes // 4, dtype=torch.float32, device=like.device),
        )

    def partials(self, weights: DecoderWeights, tokens: int, splits: int) -> Partials | None:
        """Room for the splits of as many of `tokens` rows as fit; None if there is one split only."""
        if splits <= 1:
            return None
        rows = min(tokens, self.splits.nbytes // split_bytes(weights, splits))
        each = rows * weights.heads * splits
        out, lse = self.splits[: each * weights.head_dim], self.splits[each * weights.head_dim :][:each]
        return Partials(out.view(rows, weights.heads, splits, -1), lse.view(rows, weights.heads, splits))

    @property
    def num_bytes(self) -> int:
        """Its size."""
        rows = (self.hidden, self.normed, self.qkv, self.attended, self.both, self.gated, self.entry, self.last)
        return sum(t.nbytes for t in (*rows, self.logits, self.splits))


@dataclass(frozen=True, slots=True, eq=False)
class StepTokens:
    """The tokens of a step, padding included."""

    ids: torch.Tensor  # int64 [T]
    carried: torch.Tensor
    """The row of the step before whose sample stands in the id's place; -1: none.  # int64 [T]"""
    drawn: torch.Tensor
    """Samples of the step before.  # int32 [rows]"""


def split_bytes(weights: DecoderWeights, splits: int) -> int:
    """What the splits of one row's keys take."""
    return weights.heads * splits * (weights.head_dim + 1) * 4


class Decoder:
    """Runs the network.

    Args:
        weights: of the model.
        kv: its cache.
        overlap: whether kernels begin while the ones before them end (Hopper and later).
    """

    def __init__(self, weights: DecoderWeights, kv: PagedKV, *, overlap: bool) -> None:
        self.weights = weights
        self._kv = kv
        self._overlap = overlap
        self._whole = tuple((number,) for number in range(len(weights.layers)))

    def run(
        self,
        tokens: StepTokens,
        batch: AttentionBatch,
        wanted: torch.Tensor,
        scratch: Scratch,
        path: ForwardPath | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the batch and write its KV.

        Args:
            tokens: what enters.
            batch: who sees what.
            wanted: flat rows whose logits are asked for.  # int64 [R]
            scratch: large enough.
            path: the layers that run; None: all of them.

        Returns:
            Logits and last hidden states (after the final norm) of the wanted rows, parts of the scratch.
            # fp32 [R, vocab], [R, hidden]
        """
        num_tokens, num_rows = len(tokens.ids), len(wanted)
        weights, hidden = self.weights, scratch.hidden[:num_tokens]
        embed(tokens.ids, tokens.carried, tokens.drawn, weights.embedding, hidden)
        for group in self._whole if path is None else path.groups:
            entry = hidden if len(group) == 1 else scratch.entry[:num_tokens].copy_(hidden)
            for number in group:
                self._attention(number, entry, hidden, batch, scratch)
                self._mlp(weights.layers[number], hidden, scratch)
        last = scratch.last[:num_rows]
        torch.index_select(hidden, 0, wanted, out=last)
        rms_norm(last, weights.norm, weights.epsilon, last, overlap=self._overlap)
        logits = scratch.logits[:num_rows]
        tile = tile_for(min(num_rows, SOME), weights.head.shape[0], last.shape[1], last.element_size())
        assert tile is not None
        product(last, weights.head, tile, out=logits, overlap=self._overlap)
        return logits, last

    def _attention(
        self, number: int, entry: torch.Tensor, hidden: torch.Tensor, batch: AttentionBatch, scratch: Scratch
    ) -> None:
        w, count = self.weights, len(hidden)
        layer = w.layers[number]
        x = rms_norm(entry, layer.input_norm, w.epsilon, scratch.normed[:count], overlap=self._overlap)
        qkv = self._product(x, layer.qkv, scratch.qkv[:count], bias=layer.qkv_bias)
        if layer.head_norms is not None:
            rms_norm(qkv, layer.head_norms, w.epsilon, qkv, overlap=self._overlap)
        heads = qkv.view(count, -1, w.head_dim)
        query, key, value = torch.split(heads, [w.heads, w.kv_heads, w.kv_heads], dim=1)
        keys, values = self._kv.slots[number]
        rope_write_kv(
            query,
            key,
            value,
            w.cosines,
            w.sines,
            batch.positions,
            keys,
            values,
            batch.slot_mapping,
            query,
            overlap=self._overlap,
        )
        attended, _ = attend(
            query,
            keys,
            values,
            batch,
            scale=layer.scale,
            window=layer.window,
            out=scratch.attended[:count],
            partials=scratch.partials(w, count, batch.splits),
            overlap=self._overlap,
        )
        self._product(attended.flatten(1), layer.o, hidden, residual=hidden)

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor, scratch: Scratch) -> None:
        w, count = self.weights, len(hidden)
        x = rms_norm(hidden, layer.mlp_norm, w.epsilon, scratch.normed[:count], overlap=self._overlap)
        gated = scratch.gated[:count]
        tile = tile_for(count, w.inner, x.shape[1], x.element_size())
        if tile is None:
            apply_gate(torch.mm(x, layer.gate_up.T, out=scratch.both[:count]), gated, overlap=self._overlap)
        else:
            product(x, layer.gate_up, tile, gated=True, out=gated, overlap=self._overlap)
        self._product(gated, layer.down, hidden, residual=hidden)

    def _product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tile = tile_for(len(x), weight.shape[0], x.shape[1], x.element_size())
        if tile is not None:
            return product(x, weight, tile, bias=bias, residual=residual, out=out, overlap=self._overlap)
        if residual is not None:
            return residual.addmm_(x, weight.T) if residual is out else torch.addmm(residual, x, weight.T, out=out)
        return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
