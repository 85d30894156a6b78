"""The memory of a suffix structure: one array of words, handed out in blocks that are used again.

Compiled code takes a structure as one argument that way. A block is known by the index of its first word, which stays
right when the array grows: growing is a copy. Index 0 means none, because the header stands there.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from paceline.arrays import IntArray

TOP = 0
"""Word of the header: the first word that was never handed out."""
_FREE = 32
"""Words of the header from here on: the first free block of each class; its first word says the next one."""
HEADER = 64

inner = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compile what only compiled code calls. There is no way in from Python, which saves time of compiling."""


@inner
def take(m: np.ndarray, size_class: int) -> int:
    """A block of 2^size_class words, with whatever stands there. The caller made sure that there is room."""
    block = m[_FREE + size_class]
    if block:
        m[_FREE + size_class] = m[block]
    else:
        block = m[TOP]
        m[TOP] = block + (1 << size_class)
    return block


@inner
def give(m: np.ndarray, block: int, size_class: int) -> None:
    """Take a block back."""
    m[block] = m[_FREE + size_class]
    m[_FREE + size_class] = block


@inner
def double(m: np.ndarray, field: int) -> None:
    """Put a block into one twice as big, with its content twice. A word says where it is, the next one its class."""
    old, size_class = m[field], m[field + 1]
    size = 1 << size_class
    new = take(m, size_class + 1)
    for i in range(size):
        m[new + i] = m[new + size + i] = m[old + i]
    give(m, old, size_class)
    m[field] = new
    m[field + 1] = size_class + 1


def grown(m: IntArray) -> IntArray:
    """The same in an array twice as long."""
    bigger = np.zeros(2 * len(m), dtype=np.int64)
    bigger[: len(m)] = m
    return bigger
