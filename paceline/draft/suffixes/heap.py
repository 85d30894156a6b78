"""A heap of numbers: the one with the greatest value first, of equals the smallest number."""

from __future__ import annotations

import numpy as np

from paceline.draft.suffixes.memory import inner


@inner
def push(heap: np.ndarray, size: int, values: np.ndarray, number: int) -> None:
    """Add a number to a heap of this size."""
    at = size
    while at and _before(values, number, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = number


@inner
def pop(heap: np.ndarray, size: int, values: np.ndarray) -> int:
    """Take the first number from a heap of this size."""
    first, last, at, child = heap[0], heap[size - 1], 0, 1
    while child < size - 1:
        if child + 1 < size - 1 and _before(values, heap[child + 1], heap[child]):
            child += 1
        if not _before(values, heap[child], last):
            break
        heap[at] = heap[child]
        at, child = child, 2 * child + 1
    heap[at] = last
    return first


@inner
def _before(values: np.ndarray, a: int, b: int) -> bool:
    return values[a] > values[b] or (values[a] == values[b] and a < b)
