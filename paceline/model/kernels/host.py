"""Builds an `AttentionBatch` on the host: all its fields in one buffer, hence one copy to the device a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.arrays import BoolArray, IntArray
from paceline.model.kernels.batch import (
    CHUNK_FROM,
    CHUNK_ROWS,
    DECODE_ROWS,
    PROGRAMS,
    SPLIT_KEYS,
    AttentionBatch,
    Tiles,
)
from paceline.model.kernels.layout import lay_slots, lay_tiles, share_splits


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Sizes of the buffers: one CUDA graph is captured for each."""

    max_tokens: int
    max_seqs: int
    max_blocks: int
    """Blocks of the longest block table."""
    block_size: int
    groups: int
    """Query heads of one KV head."""
    tree_words: int = 1
    """Words of 64 tree keys; 0 if no sequence has a tree."""
    max_tiles: int | None = None
    """Decode tiles; None asks for as many as `max_tokens` rows of `max_seqs` sequences can need."""
    max_chunk_tiles: int = 0
    """Tiles of prefill chunks; a shape without them runs every sequence in decode tiles."""
    max_splits: int = 0
    """Splits of the keys that may be shared among programs; 1: none are, 0 asks for as many as `max_blocks` fill."""
    kv_heads: int = 1
    extra: tuple[tuple[str, int], ...] = ()
    """Names and sizes of further fields (int64) that travel with the batch."""

    @property
    def tile_queries(self) -> int:
        """Queries of a decode tile."""
        return max(1, DECODE_ROWS // self.groups)

    @property
    def chunk_queries(self) -> int:
        """Queries of a tile of a prefill chunk."""
        return max(1, CHUNK_ROWS // self.groups)

    @property
    def num_tiles(self) -> int:
        """Decode tiles in the buffers."""
        if self.max_tiles is not None:
            return self.max_tiles
        return self.max_seqs + self.max_tokens // self.tile_queries

    @property
    def num_splits(self) -> int:
        """The most splits of a decode tile that programs share."""
        return self.max_splits or -(-self.max_blocks * self.block_size // SPLIT_KEYS)

    @property
    def num_items(self) -> int:
        """Places for decode tiles, those that several programs share counted for each."""
        return self.num_tiles + min(programs_of(self.kv_heads), self.num_tiles * (self.num_splits - 1))

    def layout(self) -> dict[str, tuple[type[np.integer], tuple[int, ...]]]:
        """Name, type and shape of every field, widest types first so that all are aligned."""
        seqs, words = self.max_seqs, self.tree_words
        return {
            "slot_mapping": (np.int64, (self.max_tokens,)),
            "tree_mask": (np.int64, (self.max_tokens, words)),
            **{name: (np.int64, (size,)) for name, size in self.extra},
            "query_start": (np.int32, (seqs + 1,)),
            "context_len": (np.int32, (seqs,)),
            "key_start": (np.int32, (seqs,)),
            "key_end": (np.int32, (seqs,)),
            "tree_start": (np.int32, (seqs,)),
            "block_tables": (np.int32, (seqs, self.max_blocks)),
            "tree_positions": (np.int32, (seqs, 64 * words)),
            "positions": (np.int32, (self.max_tokens,)),
            "splits_each": (np.int32, (1,)),
            **{f"tile_{name}": (np.int32, (self.num_items,)) for name in _OF_TILES},
            **{f"chunk_tile_{name}": (np.int32, (self.max_chunk_tiles,)) for name in _OF_TILES},
        }


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Who sees whom among the last keys of one sequence: draft nodes in the cache, then the new tokens."""

    visible: BoolArray  # [n, tail + n]
    tail_positions: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # [tail]

    def words(self, tree_words: int) -> IntArray:
        """The rows of `visible` as bits, the first key in the lowest bit of the first word.  # [n, tree_words]"""
        n, width = self.visible.shape
        assert width <= 64 * tree_words, f"a tree of {width} keys needs more than {tree_words} words"
        bits = np.zeros((n, 64 * tree_words), dtype=np.bool_)
        bits[:, :width] = self.visible
        return np.packbits(bits, axis=1, bitorder="little").view(np.int64)


class BatchBuffers:
    """One host buffer, its twin on the device, and the batch made of views of the latter.

    Args:
        shape: sizes of all fields.
        device: where the kernels run; host memory is pinned if it is a GPU.
    """

    def __init__(self, shape: BatchShape, device: torch.device) -> None:
        self.shape = shape
        layout = shape.layout()
        size = sum(_padded_bytes(kind, dims) for kind, dims in layout.values())
        self._host = torch.zeros(size // 8, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device, pin_memory=False)
        self._fields: dict[str, NDArray[np.integer]] = {}
        views: dict[str, torch.Tensor] = {}
        offset = 0
        for name, (kind, dims) in layout.items():
            end = offset + np.dtype(kind).itemsize * math.prod(dims)
            self._fields[name] = self._host.numpy().view(np.uint8)[offset:end].view(kind).reshape(dims)
            views[name] = self._device.view(torch.uint8)[offset:end].view(_TORCH[kind]).view(dims)
            offset += _padded_bytes(kind, dims)
        # Nothing is written or computed yet. Native code is compiled with that, not in somebody's first step.
        f = self._fields
        assert lay_slots(f["query_start"][:1], f["context_len"], f["block_tables"], shape.block_size, f["slot_mapping"])
        share_splits(np.empty(0, dtype=np.int64), f["key_end"][:0], 1, 1, SPLIT_KEYS, 1)
        f["splits_each"][0] = 1
        for name in ("tile", "chunk_tile"):
            tile = [f[f"{name}_{of}"] for of in _OF_TILES]
            lay_tiles(f["query_start"][:1], f["key_end"], 1, 1, 1, SPLIT_KEYS, 1, *tile)
        self._device.copy_(self._host)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        each = views.pop("splits_each")

        def tiles_of(name: str, queries: int, splits: int, most: int) -> Tiles:
            seq, start, split = (views.pop(f"{name}_{of}") for of in _OF_TILES)
            return Tiles(seq, start, split, each, queries, splits, most)

        tiles = (
            tiles_of("tile", shape.tile_queries, shape.num_splits, shape.num_tiles),
            tiles_of("chunk_tile", shape.chunk_queries, 0, shape.max_chunk_tiles),
        )
        self.extra = {name: views.pop(name) for name, _ in shape.extra}
        self.batch = AttentionBatch(**views, tiles=tiles, block_size=shape.block_size)

    def fill(
        self,
        num_new: Sequence[int],
        context_len: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        positions: IntArray,
        trees: Sequence[Tree | None] = (),
        key_start: Sequence[int] | None = None,
        key_end: Sequence[int] | None = None,
        extra: Mapping[str, IntArray] | None = None,
    ) -> AttentionBatch:
        """Describe a step and copy it to the device, without waiting for the copy (but for the one before it).

        Args:
            num_new: New tokens of each sequence; sequences in decode tiles come first.  [S]
            context_len: Keys in the cache before them.  [S]
            block_tables: Blocks of each sequence, including those of the new tokens.
            positions: Of all new tokens.  [T]
            trees: The draft tree of each sequence, None for plain causal order; empty if nobody has one.
            key_start: First cache index read, to attend to a segment.  [S]
            key_end: Where reading ends.  [S]
            extra: First values of the further fields.

        Returns:
            The batch, the same object every time.
        """
        f = self._fields
        if self._copied is not None:
            self._copied.synchronize()
        new = np.asarray(num_new, dtype=np.int64)
        context = np.asarray(context_len, dtype=np.int64)
        num_seqs, num_tokens = len(new), int(new.sum())
        f["query_start"][0] = 0
        np.cumsum(new, out=f["query_start"][1 : num_seqs + 1])
        f["query_start"][num_seqs + 1 :] = num_tokens
        starts = f["query_start"][: num_seqs + 1]
        f["context_len"][:num_seqs] = context
        f["key_start"][:num_seqs] = 0 if key_start is None else key_start
        f["key_end"][:num_seqs] = context + new if key_end is None else key_end
        f["tree_start"][:num_seqs] = context + new
        f["positions"][:num_tokens] = positions
        for table, blocks in zip(f["block_tables"], block_tables, strict=False):
            table[: len(blocks)] = blocks
        fits = lay_slots(starts, f["context_len"], f["block_tables"], self.shape.block_size, f["slot_mapping"])
        assert fits, "a sequence is longer than the shape's block tables"
        for s, tree in enumerate(trees):
            if tree is not None:
                self._fill_tree(s, int(starts[s]), int(starts[s + 1]), tree)
        self._fill_tiles(starts, new)
        for name, values in (extra or {}).items():
            f[name][: len(values)] = values
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))
        return self.batch

    def _fill_tree(self, s: int, first: int, last: int, tree: Tree) -> None:
        f = self._fields
        width = tree.visible.shape[1]
        f["tree_start"][s] -= width
        f["tree_mask"][first:last] = tree.words(self.shape.tree_words)
        tail = len(tree.tail_positions)
        f["tree_positions"][s, :tail] = tree.tail_positions
        f["tree_positions"][s, tail:width] = f["positions"][last - (width - tail) : last]

    def _fill_tiles(self, starts: NDArray[np.integer], new: IntArray) -> None:
        shape, f = self.shape, self._fields
        longest = CHUNK_FROM - 1 if shape.max_chunk_tiles else shape.max_tokens
        chunk = new > longest
        assert not chunk.any() or chunk[chunk.argmax() :].all(), "sequences in decode tiles come first"
        keys = (f["key_end"] - f["key_start"])[: len(new)]
        each, most = share_splits(new, keys, longest, shape.tile_queries, SPLIT_KEYS, programs_of(shape.kv_heads))
        if shape.num_splits == 1:
            each = max(most, 1)
        assert each >= most or most <= shape.num_splits, "more keys than the shape's splits hold"
        f["splits_each"][0] = each
        for name, least, up_to, queries, share, room in (
            ("tile", 1, longest, shape.tile_queries, each, shape.num_tiles),
            ("chunk_tile", longest + 1, shape.max_tokens, shape.chunk_queries, _ALL, shape.max_chunk_tiles),
        ):
            tile = [f[f"{name}_{of}"] for of in _OF_TILES]
            tiles, items = lay_tiles(starts, keys, least, up_to, queries, SPLIT_KEYS, share, *tile)
            assert tiles <= room and items <= len(tile[0]), f"{tiles} {name}s are more than the shape has"  # noqa: PT018


def programs_of(kv_heads: int) -> int:
    """Programs wanted for each KV head."""
    return -(-PROGRAMS // kv_heads)


def _padded_bytes(kind: type[np.integer], dims: tuple[int, ...]) -> int:
    """Size of a field: every field starts at a multiple of 16 bytes, or Triton would compile for each alignment."""
    return -(-np.dtype(kind).itemsize * math.prod(dims) // 16) * 16


_OF_TILES = ("seq", "start", "split")
"""Fields of `Tiles` in the buffers, in its order."""
_ALL = 1 << 30
"""Splits, more than there are."""
_TORCH = {np.int64: torch.int64, np.int32: torch.int32}
