"""A KV cache for writing many documents in step: room for all of a document is taken once.

The library's growing cache copies everything at each token and asks for a slightly larger piece of memory every time,
which on a GPU leaves holes that the next, larger request does not fit into.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """The cache of one layer. `keys` and `values` are views of the part that is filled."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._room: list[torch.Tensor] = []  # keys, values: [rows, heads, length, head_dim]

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; all keys and values so far."""
        if not self._room:
            self.lazy_initialization(keys, values)
            self._room = [t.new_empty((*t.shape[:2], self._length, t.shape[3])) for t in (keys, values)]
        start = self.get_seq_length()
        end = start + keys.shape[2]
        for room, new in zip(self._room, (keys, values), strict=True):
            room[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        filled = self.get_seq_length()
        for i in range(len(self._room)):  # one by one, so that the memory of only one is there twice
            self._room[i] = self._room[i][indices]
        if self._room:
            self._show(filled)

    def _show(self, filled: int) -> None:
        self.keys, self.values = (room[:, :, :filled] for room in self._room)


def roomy_cache(config: Any, length: int) -> DynamicCache:
    """An empty cache for documents of up to `length` tokens; layers with a sliding window keep the library's own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_keyword(model: torch.nn.Module) -> str:
    """What a model's forward calls its cache: transformers renamed it in 5.24 and warns of the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
