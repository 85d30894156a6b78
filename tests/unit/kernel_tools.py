"""Random ragged batches for the kernels' tests: one place that chooses the device and poisons what must not be read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from paceline.model.kernels.batch import PROGRAMS, AttentionBatch
from paceline.model.kernels.host import BatchBuffers, BatchShape, Tree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Sequence:
    """A sequence of a test batch: `parents` makes it a tree, `tail` of whose nodes are in the cache already."""

    context_len: int
    num_new: int = 1
    parents: tuple[int, ...] | None = None  # [tail + num_new]; -1 sees the context only
    tail: int = 0

    def tree(self) -> Tree | None:
        """Ancestors and self, for every new node."""
        if self.parents is None:
            return None
        size = len(self.parents)
        seen = np.eye(size, dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return Tree(seen[self.tail :], self.node_positions()[: self.tail])

    def node_positions(self) -> np.ndarray:
        """Positions of all nodes: the context's length plus their depth."""
        assert self.parents is not None
        base = self.context_len - self.tail
        found: list[int] = []
        for parent in self.parents:
            found.append(base if parent < 0 else found[parent] + 1)
        return np.array(found, dtype=np.int64)

    def positions(self) -> np.ndarray:
        """Positions of the new tokens."""
        if self.parents is None:
            return np.arange(self.context_len, self.context_len + self.num_new)
        return self.node_positions()[self.tail :]


def chain(length: int) -> tuple[int, ...]:
    """A chain is a tree."""
    return tuple(range(-1, length - 1))


def bushy(size: int, seed: int = 0) -> tuple[int, ...]:
    """Every node's parent is any earlier one."""
    rng = np.random.default_rng(seed)
    return (-1, *(int(rng.integers(0, node)) for node in range(1, size)))


def tree_of(context_len: int, parents: tuple[int, ...], tail: int = 0) -> Sequence:
    """A sequence whose last keys are a tree."""
    return Sequence(context_len, len(parents) - tail, parents, tail)


@dataclass
class Case:
    """A batch with its queries and poisoned pools."""

    batch: AttentionBatch
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    num_tokens: int
    shape: BatchShape
    tables: list[list[int]]


def make(
    sequences: list[Sequence],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    padding: int = 3,
    chunk_tiles: int = 0,
    tree_words: int | None = None,
    tables: list[list[int]] | None = None,
    programs: int = PROGRAMS,
    max_splits: int = 0,
) -> Case:
    """Keys and values of `sequences` scattered over a pool whose other slots hold NaN."""
    rng = np.random.default_rng(seed)
    lengths = [s.context_len + s.num_new for s in sequences]
    blocks = [-(-n // BLOCK_SIZE) for n in lengths]
    if tables is None:
        order = rng.permutation(sum(blocks) + 2).tolist()
        tables = [[order.pop() for _ in range(n)] for n in blocks]
    pool_blocks = 1 + max(max(t) for t in tables)
    width = max((len(s.parents) for s in sequences if s.parents is not None), default=0)
    shape = BatchShape(
        max_tokens=sum(s.num_new for s in sequences) + padding,
        max_seqs=len(sequences) + padding,
        max_blocks=max(blocks) + (1 if padding else 0),
        block_size=BLOCK_SIZE,
        groups=heads // kv_heads,
        tree_words=-(-width // 64) if tree_words is None else tree_words,
        max_chunk_tiles=chunk_tiles,
        max_splits=max_splits,
        kv_heads=-(-PROGRAMS // programs),  # only says how many programs share the keys
    )
    buffers = BatchBuffers(shape, DEVICE)
    batch = buffers.fill(
        [s.num_new for s in sequences],
        [s.context_len for s in sequences],
        tables,
        np.concatenate([s.positions() for s in sequences]),
        [s.tree() for s in sequences],
    )
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for _ in range(2):
        pool = torch.full((pool_blocks * BLOCK_SIZE, kv_heads, head_dim), float("nan"))
        for table, length in zip(tables, lengths, strict=True):
            slots = torch.tensor(table).repeat_interleave(BLOCK_SIZE) * BLOCK_SIZE
            slots = (slots + torch.arange(len(slots)) % BLOCK_SIZE)[:length]
            pool[slots] = torch.randn((length, kv_heads, head_dim), generator=generator)
        pools.append(pool.to(DEVICE, dtype))
    query = torch.randn((shape.max_tokens, heads, head_dim), generator=generator).to(DEVICE, dtype)
    num_tokens = shape.max_tokens - padding
    query[num_tokens:] = float("nan")
    return Case(batch, query, pools[0], pools[1], num_tokens, shape, tables)
