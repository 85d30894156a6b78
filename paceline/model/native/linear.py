"""A single product outside the native forward: for models that it does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from paceline.model.native.matmul import BLOCK, CALL, block_sums, call_product, product_address
from paceline.model.native.team import team

if TYPE_CHECKING:
    from paceline.model.tiled_linear import TiledLinear

_WORTH_SHARING = 1 << 22
"""Multiplications from which waking other threads pays."""


def multiply(layer: TiledLinear, rows: torch.Tensor) -> torch.Tensor:
    """The product of fp32 rows with a layer's weight.  # [M, K] -> [M, N]"""
    x = rows.contiguous().numpy()
    sums = torch.empty(len(x), layer.blocks).numpy()
    filled = torch.empty(len(x), layer.tiles * 16)
    out = filled.numpy()
    address, levels = product_address(layer.kind), layer.levels.data_ptr()
    numbers = 0 if layer.numbers is None else layer.numbers.data_ptr()
    _sums(x, sums)

    def part(thread: int, threads: int, _: int) -> None:
        groups = -(-layer.tiles // 4)
        first, last = (min(groups * i // threads * 4, layer.tiles) for i in (thread, thread + 1))
        _product(address, x, sums, levels, numbers, first, last, out)

    if x.size * layer.out_features >= _WORTH_SHARING:
        team().run(part)
    else:
        part(0, 1, 0)
    return filled[:, : layer.out_features]


@njit(nogil=True, error_model="numpy", cache=True)
def _sums(x: np.ndarray, sums: np.ndarray) -> None:
    for row in range(len(x)):
        block_sums(x[row], sums[row])


@njit(nogil=True, error_model="numpy", cache=True)
def _product(
    address: int, x: np.ndarray, sums: np.ndarray, levels: int, numbers: int, first: int, last: int, out: np.ndarray
) -> None:
    call = np.empty(CALL, np.int64)
    call[0], call[1], call[2], call[3] = x.ctypes.data, x.shape[1], sums.ctypes.data, x.shape[0]
    call[4], call[5], call[6], call[7], call[8] = x.shape[1] // BLOCK, levels, numbers, first, last
    call[9], call[10], call[11] = out.ctypes.data, out.shape[1], False
    call_product(address, call.ctypes.data)
