"""Memory in large pages: a step reads all weights, and where pages have 4 KB, looking each of them up takes time."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
_ALIGNMENT = 64


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on the CPU whose pages are taken when written, in large pieces where the system has them."""
    size = math.prod(shape)
    if not size or _HUGE is None:
        return torch.zeros(shape, dtype=dtype)
    buffer = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them says so
        buffer.madvise(_HUGE)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


class Arena:
    """Hands out pieces of large allocations, for tensors that live as long as their model.

    Args:
        piece: bytes of an allocation; larger tensors get one of their own.
    """

    def __init__(self, piece: int = 64 << 20) -> None:
        self._piece = piece
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy that begins where whole vectors can be loaded."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + tensor.nbytes > len(self._buffer):
            self._buffer, start = zeros((max(self._piece, tensor.nbytes),), torch.uint8), 0
        self._used = start + tensor.nbytes
        found = self._buffer[start : self._used].view(tensor.dtype).reshape(tensor.shape)
        found.copy_(tensor)
        return found
