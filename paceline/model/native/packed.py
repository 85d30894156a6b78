"""Arrays and numbers as one row of 64-bit words, so that native code can be called by an address and a pointer to it.

Every argument takes `WORDS` words: an address and a shape, or a number. All threads of a team read the same row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit
from numba.core import cgutils, types
from numba.extending import intrinsic

WORDS = 6
"""An address and up to five sizes."""


def pack(arguments: Sequence[np.ndarray | float], words: np.ndarray) -> None:
    """Write arguments down; arrays must be contiguous and outlive the call.  # words int64 [at least 6 * arguments]"""
    for i, argument in enumerate(arguments):
        at = WORDS * i
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous, "native code takes no strides"
            words[at] = argument.ctypes.data
            words[at + 1 : at + 1 + argument.ndim] = argument.shape
        else:
            words[at : at + 1].view(np.float64)[0] = argument


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@njit(nogil=True, error_model="numpy")
def array1(words: Any, i: int, dtype: Any) -> Any:
    """Argument number i, an array of one dimension."""
    return carray(_pointer(words[WORDS * i]), (words[WORDS * i + 1],), dtype)


@njit(nogil=True, error_model="numpy")
def array2(words: Any, i: int, dtype: Any) -> Any:
    """Likewise of two."""
    return carray(_pointer(words[WORDS * i]), (words[WORDS * i + 1], words[WORDS * i + 2]), dtype)


@njit(nogil=True, error_model="numpy")
def array4(words: Any, i: int, dtype: Any) -> Any:
    """Likewise of four."""
    at = WORDS * i
    return carray(_pointer(words[at]), (words[at + 1], words[at + 2], words[at + 3], words[at + 4]), dtype)


@njit(nogil=True, error_model="numpy")
def array5(words: Any, i: int, dtype: Any) -> Any:
    """Likewise of five."""
    at = WORDS * i
    shape = (words[at + 1], words[at + 2], words[at + 3], words[at + 4], words[at + 5])
    return carray(_pointer(words[at]), shape, dtype)


@njit(nogil=True, error_model="numpy")
def number(words: Any, i: int) -> Any:
    """Argument number i, a number."""
    return words[WORDS * i : WORDS * i + 1].view(np.float64)[0]
