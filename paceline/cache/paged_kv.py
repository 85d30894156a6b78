"""The KV tensors: one pool of blocks for all layers, addressed by slots (block * block_size + offset)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.arrays import IntArray
from paceline.cache.pages import zeros

Compact = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Copies slots of a pool: the pool, where from, where to (int64 on its device)."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's KV takes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class PagedKV:
    """Keys and values of `num_blocks` blocks.

    Pages of the pool (of 2 MB where the system has them) are touched only when written, so an idle cache costs no
    memory on a CPU.
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.shape = shape
        self.block_size = block_size
        self.num_blocks = num_blocks
        size = (shape.num_layers, 2, num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        on_host = device.type == "cpu"
        self._data = zeros(size, shape.dtype) if on_host else torch.zeros(size, dtype=shape.dtype, device=device)
        self._slots = self._data.flatten(2, 3)  # [layers, 2, slots, kv_heads, head_dim]
        self._blocks = self._data.flatten(3)  # [layers, 2, blocks, block_size * kv_heads * head_dim]
        self._layer_slots = [tuple(layer) for layer in self._slots]
        self._layer_blocks = [tuple(layer) for layer in self._blocks]
        self._compact: Compact | None = None

    @property
    def nbytes(self) -> int:
        """Size of the pool in bytes."""
        return self._data.nbytes

    @property
    def slots(self) -> torch.Tensor:
        """The pool itself.  # [layers, 2, slots, kv_heads, head_dim]"""
        return self._slots

    def compact_with(self, kernel: Compact) -> None:
        """Move slots by a kernel from now on; it is compiled here, not when somebody's first draft is accepted."""
        self._compact = kernel
        self.move([0], [0])

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new tokens.  slots [n], keys and values [n, kv_heads, head_dim]"""
        key_pool, value_pool = self._layer_slots[layer]
        key_pool.index_copy_(0, slots, keys)
        value_pool.index_copy_(0, slots, values)

    def gather(self, layer: int, blocks: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `num_tokens` of a block table, in position order.  2 x [num_tokens, kv_heads, head_dim]"""
        view = (-1, self.shape.num_kv_heads, self.shape.head_dim)
        key_pool, value_pool = self._layer_blocks[layer]
        keys = key_pool.index_select(0, blocks).view(view)[:num_tokens]
        values = value_pool.index_select(0, blocks).view(view)[:num_tokens]
        return keys, values

    def move(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots in all layers, to compact accepted paths.

        Args:
            source: what is copied; of one path they ascend.
            target: where to, likewise, none of which lies behind its source. Paths share no slots.
        """
        device = self._data.device
        if self._compact is not None:
            moves = torch.tensor([source, target], dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
            with torch.cuda.device(device):
                self._compact(self._slots, *moves.unbind())
            return
        read, write = torch.tensor([source, target], dtype=torch.int64, device=device).unbind()
        self._slots.index_copy_(2, write, self._slots.index_select(2, read))


def slots_of(table: Sequence[int], block_size: int, start: int, stop: int) -> IntArray:
    """Slots of the token indices `start .. stop` of a sequence.  # [stop - start]"""
    index = np.arange(start, stop)
    blocks = np.asarray(table, dtype=np.int64)
    return blocks[index // block_size] * block_size + index % block_size
