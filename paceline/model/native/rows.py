"""What happens to one row alone: norms, rotation, gate. Sums run in an order that depends on the row's length only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from paceline.model.native.vectors import float_of_bits

_FAST = {"reassoc", "contract", "nsz", "arcp"}
_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@njit(nogil=True, error_model="numpy", fastmath={"contract"}, inline="always")
def exponential(x: Any) -> Any:
    """e^x to about 2 units in the last place, in operations that become vector code (Cephes' `expf`)."""
    x = min(max(x, np.float32(-87.3)), np.float32(88.0))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN_2_HIGH - n * _LN_2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * float_of_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """`x / rms(x) * weight`.  # all [D]"""
    squares = np.float32(0.0)
    for i in range(x.shape[0]):
        squares += x[i] * x[i]
    scale = np.float32(1.0) / np.sqrt(squares / np.float32(x.shape[0]) + np.float32(epsilon))
    for i in range(x.shape[0]):
        out[i] = x[i] * scale * weight[i]


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def rotate(head: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> None:
    """Rotary embedding in place, pairs half a head apart.  # head [d], cosine and sine [d / 2]"""
    half = head.shape[0] // 2
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cosine[i] - b * sine[i]
        head[half + i] = b * cosine[i] + a * sine[i]


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def gate(both: np.ndarray, out: np.ndarray) -> None:
    """`silu(gate) * up`.  # both [2 * I]: gate, up; out [I]"""
    size = out.shape[0]
    for i in range(size):
        g = both[i]
        out[i] = g / (np.float32(1.0) + exponential(-g)) * both[size + i]
