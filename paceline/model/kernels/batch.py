"""What the attention kernels read of a batch: device tensors of fixed shapes.

A CUDA graph replays with the same tensors, whose contents the host rewrites between steps. What is an `int` here is
part of the graph; everything else is data.

Three words. A *row* is a token of the flat batch. A *cache index* counts a sequence's keys, so that index i lies in
block `block_tables[i // block_size]`. A *position* is what rotary embedding and sliding windows see; several nodes of
a draft tree share one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SPLIT_KEYS = 256
"""Keys of one split. Fixed, so that a row's bits depend on its own context and never on the batch around it."""

DECODE_ROWS = 16
"""Rows (queries x query heads of one KV head) of a decode tile: the least that tensor cores take."""

PROGRAMS = 264
"""Programs that keep a GPU busy: two on each processor of an H200. Tiles are shared among more of them if there are
fewer."""

CHUNK_ROWS = 64
"""Rows of a tile of a prefill chunk."""

CHUNK_FROM = 66
"""New tokens from which a sequence is a chunk: decode steps and trees of up to 64 nodes, whose root comes with them,
share one tile shape, hence their bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Query tiles of one shape: tile t covers up to `queries` rows from `start[t]`, all of sequence `seq[t]`.

    A tile whose sequence has more than `each` splits stands in the list once for every so many of them: the first time
    among the first `num_tiles`, then behind them. How many a program reads changes no bit of the result.
    """

    seq: torch.Tensor  # int32 [items]; -1 is padding
    start: torch.Tensor  # int32 [items]; a row of the flat batch
    split: torch.Tensor  # int32 [items]; the first one of this item
    each: torch.Tensor
    """Splits of an item.  # int32 [1]"""
    queries: int
    """Queries of a tile."""
    splits: int
    """The most that partial results are kept for; 1: every tile stands here once; 0: keys are not split."""
    num_tiles: int
    """The most tiles, however many times each stands here."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Sequences with new tokens (a prefill chunk, one decode token, a draft tree) over paged KV.

    New token i of sequence s has cache index `context_len[s] + i`. A key before `tree_start[s]` is seen in causal order
    of cache indices; from there on, by bit: bit j of word w of `tree_mask[row]` says that the row sees cache index
    `tree_start + 64 * w + j`. A sequence without a tree has `tree_start = context_len + n`. Draft nodes may be in the
    cache already (`tree_start < context_len`).

    Only keys of `key_start .. key_end` are read: all of them usually, or one segment of the context (see `segments`).
    """

    query_start: torch.Tensor  # int32 [S + 1]
    context_len: torch.Tensor  # int32 [S]
    key_start: torch.Tensor  # int32 [S]
    key_end: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, max_blocks]
    slot_mapping: torch.Tensor  # int64 [T]; -1 is not written
    positions: torch.Tensor  # int32 [T]
    tree_start: torch.Tensor  # int32 [S]
    tree_mask: torch.Tensor  # int64 [T, W]; W = 0 if no sequence has a tree
    tree_positions: torch.Tensor  # int32 [S, 64 * W]; of the keys from tree_start on; before it, position = index
    tiles: tuple[Tiles, ...]
    """Decode tiles, then chunk tiles; rows of decode tiles come first in the flat batch where keys are split."""
    block_size: int

    @property
    def max_tokens(self) -> int:
        """Rows, padding included."""
        return self.slot_mapping.shape[0]

    @property
    def splits(self) -> int:
        """The most splits of any tile."""
        return max((tiles.splits for tiles in self.tiles), default=0)

    def segment(self, key_start: torch.Tensor, key_end: torch.Tensor) -> AttentionBatch:
        """The same queries over the cache indices `key_start .. key_end` of each sequence.  int32 [S] both"""
        return replace(self, key_start=key_start, key_end=key_end)
