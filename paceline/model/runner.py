"""Runs a `transformers` causal LM on flat ragged batches. Target and draft models use the same runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.cache.paged_kv import KVShape, PagedKV, slots_of
from paceline.model.attention import AttentionMetadata, SequenceAttention
from paceline.model.partial import PartialModel
from paceline.model.path import ForwardPath
from paceline.model.tiled_linear import TiledLinear

if TYPE_CHECKING:
    from paceline.model.gpu.graphs import GraphRunner
    from paceline.model.native.decoder import NativeDecoder

_TRITON_FROM = (8, 0)
"""Compute capability."""
_NO_TAIL = np.empty(0, dtype=np.int64)


class SequenceInput(NamedTuple):
    """One sequence's new tokens: they take the cache indices `context_len ..` of its block table.

    `visible[i, j]` says that new token i sees new token j; None is plain causal order. Draft nodes that are in the
    cache already, the last of the context, are its first columns then, and `tail_positions` says where they stand.
    """

    token_ids: Sequence[int]
    positions: IntArray
    context_len: int
    blocks: Sequence[int]
    visible: BoolArray | None = None  # [n, len(tail_positions) + n]
    tail_positions: IntArray = _NO_TAIL
    num_causal: int = 0
    """New tokens, the first, that every later one sees and that see one another in causal order."""
    carried: int = -1
    """The row of the last launched step whose sample is the first token, whatever id stands there; -1: the id."""


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """All sequences of a forward, and the flat token rows whose logits are wanted; `path` runs part of the model."""

    sequences: tuple[SequenceInput, ...]
    logit_rows: Sequence[int]
    path: ForwardPath | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the network: exactly the sum of the sequences' (nothing is padded)."""
        return sum(len(s.token_ids) for s in self.sequences)


@dataclass(frozen=True, slots=True, eq=False)
class RowDraws:
    """How the target's own sample of every wanted row is drawn, where that can be done on the device."""

    usable: BoolArray
    """Whether the row's law is that of its logits and temperature alone.  # [R]"""
    temperature: FloatArray  # [R]
    seed: IntArray
    """64 bits, read as unsigned.  # [R]"""
    sample_index: IntArray  # [R]
    position: IntArray
    """Of the token that is drawn.  # [R]"""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest steps of an engine."""

    tokens: int
    """Most tokens of a step, draft nodes included; larger ones are possible and slower."""
    sequences: int
    length: int
    """Longest sequence."""
    rows: int
    """Most rows of logits, prompts' not counted."""
    eager: bool = False
    """Capture nothing: launch kernels one by one."""


class ModelRunner:
    """A model with its paged KV cache.

    Args:
        model: a causal LM created with the `paceline` attention.
        kv: its cache.
        limits: the largest steps, where CUDA graphs may be captured for them.
    """

    def __init__(
        self, model: torch.nn.Module, kv: PagedKV, device: torch.device, limits: StepLimits | None = None
    ) -> None:
        self.model = model
        self.kv = kv
        self.device = device
        self._native = _native(model, kv, device)
        self._graphs = _graphs(model, kv, limits)
        if device.type == "cuda" and find_spec("triton") and torch.cuda.get_device_capability(device) >= _TRITON_FROM:
            from paceline.model.kernels.compact import compact

            kv.compact_with(compact)
        self._partial: PartialModel | None = None
        self.last_seconds = 0.0
        """Wall time of the last forward whose result was waited for."""
        self.last_wait = 0.0
        """How long the host waited for the samples that were read last."""
        self.last_read = 0.0
        """When that was over."""
        self.num_forwards = 0
        self.num_tokens = 0
        """Tokens through the network so far."""
        self.num_looks = 0
        """Times that attention was asked for (`attention_to_blocks`)."""

    def warm_up(self, on_progress: Callable[[int, int], None], *, trees: bool = False) -> None:
        """Capture what is captured before the first request.

        Args:
            on_progress: gets what is done and how much there is.
            trees: whether there will be draft trees.
        """
        if self._graphs is not None:
            self._graphs.warm_up(on_progress, trees=trees)

    @property
    def num_preparations(self) -> int:
        """Forwards so far for which something was compiled or captured: their times tell nothing."""
        return 0 if self._graphs is None else self._graphs.num_captures

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the batch and write its KV.

        Returns:
            Logits of `batch.logit_rows`; on a GPU the next forward may overwrite them.  # [len(logit_rows), vocab]
        """
        return self._run(batch, hidden=False)[0]

    @property
    def way(self) -> str:
        """How forwards run on a GPU: in `graphs`, in our `kernels` one by one, or through `transformers` `modules`."""
        if self._graphs is None:
            return "modules"
        return "kernels" if self._graphs.eager else "graphs"

    @property
    def draws(self) -> bool:
        """Whether the target's own samples can be drawn on the device (`launch`)."""
        return self._graphs is not None

    @property
    def most_carried(self) -> int:
        """Rows of a launched step whose samples may enter the next one before they are read."""
        return 0 if self._graphs is None else self._graphs.most_carried

    def launch(self, batch: ForwardBatch, draws: RowDraws) -> tuple[torch.Tensor, Callable[[], IntArray]]:
        """Start the forward where `draws`, without waiting for it.

        Returns:
            Logits, which the next forward overwrites; and what waits for the target's own samples of the rows and
            reads them, -1 where no logit is finite: once, before the next launch but one.  # [R, vocab], [R]
        """
        assert self._graphs is not None, "nothing here draws on the device"
        started = time.perf_counter()
        logits, read = self._graphs.launch(batch, draws)
        self._count(batch, started)

        def samples() -> IntArray:
            asked = time.perf_counter()
            found = read()
            now = time.perf_counter()
            self.last_wait = now - asked
            # A step that was launched behind another began when that one ended.
            self.last_seconds = now - max(started, self.last_read)
            self.last_read = now
            return found

        return logits, samples

    def forward_with_hidden(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the last hidden states (after the final norm) of the same rows.  # [len(logit_rows), hidden]"""
        logits, hidden = self._run(batch, hidden=True)
        assert hidden is not None
        return logits, hidden.clone() if self._graphs is not None else hidden

    @torch.inference_mode()
    def _run(self, batch: ForwardBatch, *, hidden: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        started = time.perf_counter()
        if self._native is not None:
            found = self._native.run(batch)
            self._count(batch, started)
            return found if hidden else (found[0], None)
        if self._graphs is not None:
            found = self._graphs.run(batch)
            torch.cuda.synchronize(self.device)
            self._count(batch, started)
            return found
        logits, states = self._through_modules(batch, self._metadata(batch), hidden=hidden)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._count(batch, started)
        return logits, states

    @torch.inference_mode()
    def attention_to_blocks(self, sequence: SequenceInput) -> FloatArray:
        """How much tokens whose KV is in the cache already attend to each block of their table, over all layers.

        Nothing is written: it is the attention that these tokens paid when they were computed.

        Args:
            sequence: computed tokens as if they were new, in causal order.

        Returns:
            Attention weights summed over tokens, heads and layers.  # [blocks that hold the sequence]
        """
        batch = ForwardBatch((sequence,), [])
        metadata = self._metadata(batch)
        weights = torch.zeros(len(metadata.sequences[0].blocks), dtype=torch.float32, device=self.device)
        self._through_modules(batch, replace(metadata, block_weights=weights), hidden=False)
        self.num_looks += 1
        return weights.double().cpu().numpy()

    def _through_modules(
        self, batch: ForwardBatch, metadata: AttentionMetadata, *, hidden: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forward of the model's own code."""
        rows = batch.logit_rows or [0]
        if batch.path is not None and self._partial is None:
            self._partial = PartialModel(self.model)
        with nullcontext() if self._partial is None else self._partial.along(batch.path):
            output = self.model(
                input_ids=self._tensor([t for s in batch.sequences for t in s.token_ids])[None],
                position_ids=self._tensor(np.concatenate([s.positions for s in batch.sequences]))[None],
                use_cache=False,
                logits_to_keep=self._tensor(rows),
                paged=metadata,
                **({"output_hidden_states": True} if hidden else {}),
            )
        logits: torch.Tensor = output.logits[0, : len(batch.logit_rows)]
        return logits, output.hidden_states[-1][0, self._tensor(rows)] if hidden else None

    def _count(self, batch: ForwardBatch, started: float) -> None:
        self.last_seconds = time.perf_counter() - started
        self.num_forwards += 1
        self.num_tokens += batch.num_tokens

    def _metadata(self, batch: ForwardBatch) -> AttentionMetadata:
        slots: list[IntArray] = []
        sequences: list[SequenceAttention] = []
        start = 0
        for s in batch.sequences:
            n = len(s.token_ids)
            end = s.context_len + n
            slots.append(slots_of(s.blocks, self.kv.block_size, s.context_len, end))
            used = s.blocks[: -(-end // self.kv.block_size)]
            sequences.append(
                SequenceAttention(
                    start, start + n, s.context_len, self._tensor(used), s.positions, s.visible, s.tail_positions
                )
            )
            start += n
        return AttentionMetadata(self.kv, self._tensor(np.concatenate(slots)), tuple(sequences))

    def _tensor(self, values: Sequence[int] | IntArray) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _native(model: torch.nn.Module, kv: PagedKV, device: torch.device) -> NativeDecoder | None:
    """The native forward, where there is one for this model."""
    if device.type != "cpu" or kv.shape.dtype is not torch.float32:
        return None
    if not any(isinstance(module, TiledLinear) for module in model.modules()):
        return None
    from paceline.model.native.decoder import NativeDecoder, runs_natively

    return NativeDecoder(model, kv) if runs_natively(model) else None


def _graphs(model: torch.nn.Module, kv: PagedKV, limits: StepLimits | None) -> GraphRunner | None:
    """The forward in our own kernels on a CUDA device, where there is one for this model."""
    if limits is None or kv.slots.device.type != "cuda" or find_spec("triton") is None:
        return None
    from paceline.model.gpu.buckets import Buckets
    from paceline.model.gpu.graphs import GraphRunner
    from paceline.model.gpu.tiles import ROOMY
    from paceline.model.gpu.weights import is_llama_like

    if not is_llama_like(model) or torch.cuda.get_device_capability(kv.slots.device)[0] not in ROOMY:
        return None
    buckets = Buckets(limits.tokens, limits.sequences, limits.length, limits.rows)
    return GraphRunner(model, kv, buckets, eager=limits.eager)


def kv_shape(config: object, dtype: torch.dtype) -> KVShape:
    """The KV layout of a `transformers` text config."""
    heads = int(config.num_attention_heads)  # type: ignore[attr-defined]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = int(config.num_hidden_layers)  # type: ignore[attr-defined]
    return KVShape(layers, int(kv_heads), int(head_dim), dtype)
