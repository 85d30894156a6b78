"""Runs a decoder step by step: the host describes a batch in one copy, and a CUDA graph does the rest.

A graph is captured for each bucket of shapes (`buckets.py`), the common ones before the first request and others when
they first come. Padding rows write no KV. On a CPU (Triton's interpreter) the same kernels run one by one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from triton.errors import TritonError

from paceline.arrays import IntArray
from paceline.cache.paged_kv import PagedKV
from paceline.engine.types import NO_LAW
from paceline.model.gpu.buckets import Bucket, Buckets, words_of
from paceline.model.gpu.decoder import Decoder, Scratch, StepTokens, split_bytes
from paceline.model.gpu.weights import fuse_weights
from paceline.model.kernels.batch import CHUNK_FROM, CHUNK_ROWS, DECODE_ROWS, SPLIT_KEYS
from paceline.model.kernels.draw import Places, draw_rows
from paceline.model.kernels.host import BatchBuffers, BatchShape, Tree, programs_of
from paceline.model.kernels.layout import share_splits
from paceline.model.kernels.rows import LogitRows
from paceline.model.path import ForwardPath

if TYPE_CHECKING:
    from paceline.model.runner import ForwardBatch, RowDraws

logger = logging.getLogger(__name__)
_OVERLAP_FROM = (9, 0)
"""Compute capability from which kernels may begin while the ones before them end."""
_CAPTURE_AT = 4
"""Times that a shape comes before it is captured, which takes as long as launching the kernels one by one so often."""
_BEYOND = 1024
"""Positions that draft nodes may take behind the longest sequence."""
_MOST_PARTIALS = 256 << 20
"""Bytes kept for attention over split keys; a step that needs more takes its own."""


@dataclass(frozen=True, slots=True, eq=False)
class _Outputs:
    """What a launch leaves on the device."""

    logits: torch.Tensor  # fp32 [R, vocab]
    hidden: torch.Tensor  # [R, hidden]
    drawn: torch.Tensor
    """NO_LAW where there is no finite maximum. The same memory for all but the largest steps.  # int32 [R]"""


@dataclass(slots=True, eq=False)
class _Captured:
    """What serves a bucket."""

    buffers: BatchBuffers
    outputs: _Outputs | None = None
    graph: Any = None


class GraphRunner:
    """The forward of a Llama-like model.

    Args:
        model: one that `is_llama_like`.
        kv: its cache.
        buckets: the shapes of the engine's steps.
        eager: launch kernels one by one.
    """

    def __init__(self, model: Any, kv: PagedKV, buckets: Buckets, *, eager: bool = False) -> None:
        self._device = kv.slots.device
        cuda = self._device.type == "cuda"
        overlap = cuda and torch.cuda.get_device_capability(self._device) >= _OVERLAP_FROM
        self._weights = fuse_weights(model, buckets.max_model_len + _BEYOND)
        self._decoder = Decoder(self._weights, kv, overlap=overlap)
        self._kv = kv
        self._buckets = buckets
        self.eager = eager or not cuda
        """Whether kernels are launched one by one."""
        w = self._weights
        most = max(buckets.sizes())
        needed = most * split_bytes(w, buckets.most_splits)
        self._scratch = Scratch.empty(w, most, min(most, buckets.max_rows), min(needed, _MOST_PARTIALS))
        self._latest = torch.full((min(most, buckets.max_rows),), NO_LAW, dtype=torch.int32, device=self._device)
        self._no_law = torch.tensor(NO_LAW, dtype=torch.int32, device=self._device)
        # Two, since a step may be launched before the one in flight is read.
        self._on_host = [torch.empty(len(self._latest), dtype=torch.int32, pin_memory=cuda) for _ in range(2)]
        self._seen: Counter[tuple[Bucket, ForwardPath | None]] = Counter()
        self._captured: dict[tuple[Bucket, ForwardPath | None], _Captured] = {}
        self._compiled: set[tuple[bool, int, bool]] = set()
        """Kinds of steps beyond every bucket that came before."""
        self.num_captures = 0
        """Times that anything was compiled or captured, which takes longer than what it is for."""
        self._stream = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if cuda and not self.eager else None

    @property
    def num_bytes(self) -> int:
        """Memory beside weights and KV, without what CUDA keeps for each graph."""
        return self._scratch.num_bytes

    @torch.inference_mode()
    def warm_up(self, on_progress: Callable[[int, int], None] = lambda *_: None, *, trees: bool = False) -> None:
        """Capture the common buckets; `trees`: of draft trees too."""
        if self.eager:
            return
        wanted = [bucket for bucket in self._buckets.first(trees=trees) if self._fits(bucket, bucket.tokens)]
        with self._on_device():
            for done, bucket in enumerate(wanted, start=1):
                self._capture(self._of(bucket, None), None)
                on_progress(done, len(wanted))

    def run(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the batch and write its KV.

        Returns:
            Logits and last hidden states of `batch.logit_rows`; the next call overwrites them.
            # fp32 [R, vocab], [R, hidden]
        """
        rows = len(batch.logit_rows)
        outputs = self._run(batch, None)
        return outputs.logits[:rows], outputs.hidden[:rows]

    @property
    def most_carried(self) -> int:
        """Rows of a step whose samples may enter the next one unread."""
        return len(self._latest)

    @torch.inference_mode()
    def launch(self, batch: ForwardBatch, draws: RowDraws) -> tuple[torch.Tensor, Callable[[], IntArray]]:
        """Start computing the batch and drawing the target's sample of every wanted row.

        Returns:
            Logits, which the next call overwrites, and what waits for the samples and reads them; it must be called
            before the next launch but one.  # fp32 [R, vocab], [R]
        """
        rows = len(batch.logit_rows)
        outputs = self._run(batch, draws)
        drawn, host = outputs.drawn[:rows], self._on_host[0]
        if len(host) < rows:
            host = torch.empty(rows, dtype=torch.int32)
        else:
            self._on_host.reverse()
        host = host[:rows]
        host.copy_(drawn, non_blocking=True)
        done = self._mark()

        def read() -> IntArray:
            if done is not None:
                done.synchronize()
            return host.numpy().astype(np.int64)

        return outputs.logits[:rows], read

    def _mark(self) -> Any:
        """This point of the device's work."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _run(self, batch: ForwardBatch, draws: RowDraws | None) -> _Outputs:
        step = _Step(batch, draws)
        splits = step.shared_splits(self._weights.heads, self._weights.kv_heads)
        rows = len(batch.logit_rows)
        bucket = self._buckets.find(step.new, rows, splits, step.tree_width)
        if bucket is None or not self._fits(bucket, step.num_decoding):  # no room for parts: programs share no keys
            splits = 1
            bucket = self._buckets.find(step.new, rows, splits, step.tree_width)
        with self._on_device():
            if bucket is None or not self._fits(bucket, step.num_decoding):
                return self._too_large(step, splits, batch.path)
            captured = self._prepare(bucket, batch.path)
            step.fill(captured.buffers, self._kv.block_size)
            if captured.graph is None:
                return self._launch(captured.buffers, self._scratch, batch.path)
            captured.graph.replay()
            assert captured.outputs is not None
            return captured.outputs

    def _fits(self, bucket: Bucket, num_decoding: int) -> bool:
        """Whether the scratch has room for a step of this bucket with so many rows in decode tiles."""
        splits = num_decoding * split_bytes(self._weights, bucket.splits) if bucket.splits > 1 else 0
        return bucket.rows <= len(self._scratch.logits) and splits <= self._scratch.splits.nbytes

    def _on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the thread's current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _launch(self, buffers: BatchBuffers, scratch: Scratch, path: ForwardPath | None) -> _Outputs:
        extra = buffers.extra
        tokens = StepTokens(extra["token_ids"], extra["carried"], self._latest)
        logits, hidden = self._decoder.run(tokens, buffers.batch, extra["logit_rows"], scratch, path)
        places = Places(extra["seed"], extra["sample_index"], extra["position"])
        temperature = extra["temperature"].view(torch.float32)[: len(logits)]
        found = draw_rows(LogitRows(logits), places, temperature)
        if len(logits) > len(self._latest):
            return _Outputs(logits, hidden, torch.where(found.finite, found.token, self._no_law))
        drawn = torch.where(found.finite, found.token, self._no_law, out=self._latest[: len(logits)])
        return _Outputs(logits, hidden, drawn)

    def _of(self, bucket: Bucket, path: ForwardPath | None) -> _Captured:
        found = self._captured.get((bucket, path))
        if found is None:
            if path is None:
                buffers = BatchBuffers(self._shape(bucket), self._device)
            else:
                buffers = self._of(bucket, None).buffers
            found = self._captured[bucket, path] = _Captured(buffers)
        return found

    def _prepare(self, bucket: Bucket, path: ForwardPath | None) -> _Captured:
        """What serves the next step: many shapes come once, those that come again are captured."""
        found = self._of(bucket, path)
        if found.graph is None and not (self.eager and self._seen[bucket, path]):
            self._seen[bucket, path] += 1
            self.num_captures += 1
            if self._seen[bucket, path] >= _CAPTURE_AT and not self.eager:
                self._capture(found, path)
        return found

    def _capture(self, captured: _Captured, path: ForwardPath | None) -> None:
        latest = self._latest.clone()  # the samples of the step in flight may enter the one that is captured for, ...
        torch.cuda.synchronize(self._device)  # ... and both use the same scratch
        try:
            with torch.cuda.stream(self._stream):
                self._compile(captured, path)
                torch.cuda.synchronize(self._device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    outputs = self._launch(captured.buffers, self._scratch, path)
            torch.cuda.synchronize(self._device)
        except (RuntimeError, TritonError):
            logger.warning("a CUDA graph could not be captured; kernels are launched one by one", exc_info=True)
            self.eager = True
            return
        finally:
            self._latest.copy_(latest)
        captured.graph, captured.outputs = graph, outputs

    def _compile(self, captured: _Captured, path: ForwardPath | None) -> None:
        """Run what is to be captured. The buffers may describe a step of before, whose slots are other requests' now:
        nothing may be written."""
        captured.buffers.batch.slot_mapping.fill_(-1)
        self._launch(captured.buffers, self._scratch, path)

    def _shape(self, bucket: Bucket) -> BatchShape:
        size = self._kv.block_size
        w = self._weights
        groups = w.heads // w.kv_heads
        chunk_tiles = bucket.seqs + bucket.tokens // max(1, CHUNK_ROWS // groups) if bucket.chunks else 0
        return BatchShape(
            max_tokens=bucket.tokens,
            max_seqs=bucket.seqs,
            max_blocks=-(-(self._buckets.max_model_len + _BEYOND) // size),
            block_size=size,
            groups=groups,
            tree_words=bucket.tree_words,
            max_splits=bucket.splits,
            kv_heads=w.kv_heads,
            max_chunk_tiles=chunk_tiles,
            extra=(
                ("token_ids", bucket.tokens),
                ("carried", bucket.tokens),
                *((name, bucket.rows) for name in ("logit_rows", "seed", "sample_index", "position")),
                ("temperature", -(-bucket.rows // 2)),
            ),
        )

    def _too_large(self, step: _Step, splits: int, path: ForwardPath | None) -> _Outputs:
        """A batch beyond every bucket runs with memory of its own."""
        count, rows = sum(step.new), len(step.wanted)
        words = words_of(step.tree_width)
        kind = splits > 1, words, max(step.new) >= CHUNK_FROM
        self.num_captures += kind not in self._compiled
        self._compiled.add(kind)
        bucket = Bucket(count, len(step.new), max(rows, 1), splits, words, max(step.new) >= CHUNK_FROM)
        buffers = BatchBuffers(self._shape(bucket), self._device)
        step.fill(buffers, self._kv.block_size)
        room = step.num_decoding * split_bytes(self._weights, splits) if splits > 1 else 0
        return self._launch(buffers, Scratch.empty(self._weights, count, max(rows, 1), room), path)


class _Step:
    """A batch in the order of the kernels: sequences in decode tiles first."""

    def __init__(self, batch: ForwardBatch, draws: RowDraws | None = None) -> None:
        self.draws = draws
        sequences = batch.sequences
        new = [len(s.token_ids) for s in sequences]
        wanted = np.asarray(batch.logit_rows, dtype=np.int64)
        if max(new) >= CHUNK_FROM and len(sequences) > 1:
            order = sorted(range(len(new)), key=lambda i: new[i] >= CHUNK_FROM)
            starts = np.concatenate([[0], np.cumsum(new)])
            moved = np.concatenate([[0], np.cumsum([new[i] for i in order])])[:-1]
            place = np.empty(len(new), dtype=np.int64)
            place[order] = moved
            owner = np.searchsorted(starts, wanted, side="right") - 1
            wanted = wanted - starts[owner] + place[owner]
            sequences, new = tuple(sequences[i] for i in order), [new[i] for i in order]
        self.sequences, self.new, self.wanted = sequences, new, wanted
        self.carried = np.array([s.carried for s in sequences], dtype=np.int64)
        self.num_decoding = sum(n for n in new if n < CHUNK_FROM)
        self.trees = [None if s.visible is None else _tree(s) for s in sequences]
        self.tree_width = max((t.visible.shape[1] for t in self.trees if t is not None), default=0)

    def shared_splits(self, heads: int, kv_heads: int) -> int:
        """Splits of the longest sequence in decode tiles if programs should share them, otherwise 1."""
        new = np.array(self.new, dtype=np.int64)
        keys = (new + np.array([s.context_len for s in self.sequences], dtype=np.int64)).astype(np.int32)
        queries = max(1, DECODE_ROWS // (heads // kv_heads))
        each, longest = share_splits(new, keys, CHUNK_FROM - 1, queries, SPLIT_KEYS, programs_of(kv_heads))
        return longest if longest > each else 1

    def fill(self, buffers: BatchBuffers, block_size: int) -> None:
        """Describe the step to the device."""
        sequences = self.sequences
        tokens = np.array([t for s in sequences for t in s.token_ids], dtype=np.int64)
        single = len(sequences) == 1
        carried = np.full(len(buffers.extra["carried"]), -1, dtype=np.int64)
        carried[np.cumsum(self.new) - self.new] = self.carried
        extra = {"token_ids": tokens, "logit_rows": self.wanted, "carried": carried}
        if self.draws is not None:
            extra |= _words_of(self.draws)
        buffers.fill(
            self.new,
            [s.context_len for s in sequences],
            [s.blocks[: -(-(s.context_len + n) // block_size)] for s, n in zip(sequences, self.new, strict=True)],
            sequences[0].positions if single else np.concatenate([s.positions for s in sequences]),
            self.trees,
            extra=extra,
        )


def _words_of(draws: RowDraws) -> dict[str, IntArray]:
    """The fields as 64-bit words, two temperatures in each."""
    temperature = np.zeros(len(draws.temperature) + len(draws.temperature) % 2, dtype=np.float32)
    temperature[: len(draws.temperature)] = draws.temperature
    return {
        "seed": draws.seed,
        "sample_index": draws.sample_index,
        "position": draws.position,
        "temperature": temperature.view(np.int64),
    }


def _tree(s: Any) -> Tree:
    """The columns of the mask that causal order does not say: those from the first draft node on."""
    assert not (s.num_causal and len(s.tail_positions)), "draft nodes in the cache come before every new token"
    return Tree(s.visible[:, s.num_causal :] if s.num_causal else s.visible, s.tail_positions)
