"""Who owns which KV block, and the prefix cache.

    free ──allocate──▶ used (reference count ≥ 1) ──last release──▶ free      if the block carries no hash
      ▲                   ▲                                   └───▶ cached    if it does
      └──evict (oldest)───┴───────────match (prefix hit)────────── cached

`free + used + cached == total` always; `check()` asserts it. A block gets a hash when all its tokens are committed
and computed. The hash chains over its predecessors and starts from the tenant's salt, so a block is only ever found
by a request with the same salt and the same tokens from the very beginning.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks by state."""

    free: int
    used: int
    cached: int


class BlockManager:
    """Allocates blocks to block tables (plain lists of block ids, position order).

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens a block holds.
        prefix_caching: keep hashed blocks of released tables for later matches.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # evictable blocks, oldest first

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now (free, or cached and evictable)."""
        return len(self._free) + len(self._cached)

    def counts(self) -> BlockCounts:
        """Blocks by state."""
        return BlockCounts(len(self._free), sum(r > 0 for r in self._references), len(self._cached))

    def check(self) -> None:
        """Assert that every block is in exactly one state and every hash points back at its block."""
        counts = self.counts()
        assert counts.free + counts.used + counts.cached == self.num_blocks, f"blocks leaked: {counts}"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert all(self._references[b] == 0 for b in (*self._free, *self._cached)), "a held block is on a list"
        assert all(self._block_of[h] == b for b, h in self._hash_of.items()), "a prefix hash points elsewhere"

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` to hold `num_tokens`; all of it or nothing. Evicts cached blocks, oldest first."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            table.append(block)
        return True

    def shrink(self, table: list[int], num_tokens: int) -> None:
        """Release the blocks at the end of `table` that `num_tokens` do not need."""
        if len(table) * self.block_size - num_tokens < self.block_size:
            return
        for block in reversed(table[self.blocks_for(num_tokens) :]):
            self._release_block(block)
        del table[self.blocks_for(num_tokens) :]

    def release(self, table: list[int]) -> None:
        """Release the whole table."""
        self.shrink(table, 0)

    def match_prefix(self, tokens: Sequence[int], salt: str) -> tuple[list[int], list[bytes]]:
        """Take the longest cached prefix of `tokens` that leaves at least one token to compute.

        Returns:
            The blocks (now held by the caller) and their hashes.
        """
        blocks: list[int] = []
        hashes: list[bytes] = []
        if not self.prefix_caching:
            return blocks, hashes
        parent = _root_hash(salt)
        for end in range(self.block_size, len(tokens), self.block_size):
            parent = _block_hash(parent, tokens[end - self.block_size : end])
            block = self._block_of.get(parent)
            if block is None:
                break
            self._references[block] += 1
            self._cached.pop(block, None)
            blocks.append(block)
            hashes.append(parent)
        return blocks, hashes

    def publish(
        self, table: Sequence[int], hashes: list[bytes], tokens: Sequence[int], num_computed: int, salt: str
    ) -> None:
        """Make the full, computed blocks of `table` findable; `hashes` (one per published block) grows along."""
        if not self.prefix_caching or num_computed < (len(hashes) + 1) * self.block_size:
            return
        for i in range(len(hashes), min(num_computed // self.block_size, len(table))):
            parent = hashes[-1] if hashes else _root_hash(salt)
            digest = _block_hash(parent, tokens[i * self.block_size : (i + 1) * self.block_size])
            hashes.append(digest)
            if digest not in self._block_of:
                self._block_of[digest] = table[i]
                self._hash_of[table[i]] = digest

    def clear_cache(self) -> None:
        """Forget every cached prefix; blocks in use lose their hashes too."""
        self._hash_of.clear()
        self._block_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def _release_block(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, f"block {block} released twice"
        if self._references[block] == 0:
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block


def _root_hash(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"paceline-salt").digest()


def _block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    data = np.asarray(tokens, dtype="<i8").tobytes()
    return hashlib.blake2b(parent + data, digest_size=16).digest()
