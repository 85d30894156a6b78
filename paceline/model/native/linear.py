"""A single product outside the native forward: for models that it does not know."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import carray

from paceline.compiled import address_of, compiled
from paceline.model.native.matmul import CALL, block_sums, multiply_part, product_address, round_row
from paceline.model.native.packed import WORDS, array1, array2, pack
from paceline.model.native.team import PART, team

if TYPE_CHECKING:
    from paceline.model.tiled_linear import TiledLinear

_WORTH_SHARING = 1 << 22
"""Multiplications from which waking other threads pays."""


def described(layer: TiledLinear) -> list[int]:
    """A layer's weight as `multiply_part` takes it; it must outlive its use there."""
    numbers = 0 if layer.numbers is None else layer.numbers.data_ptr()
    address = product_address(layer.kind, layer.rounds_inputs)
    return [address, layer.rounds_inputs, layer.blocks, layer.tiles, layer.levels.data_ptr(), numbers]


def multiply(layer: TiledLinear, rows: torch.Tensor) -> torch.Tensor:
    """The product of fp32 rows with a layer's weight.  # [M, K] -> [M, N]"""
    x = rows.contiguous().numpy()
    sums = torch.empty(len(x), layer.blocks * (2 if layer.rounds_inputs else 1)).numpy()
    rounded = np.empty(x.shape if layer.rounds_inputs else (0, 0), np.int8)
    filled = torch.empty(len(x), layer.tiles * 16)
    weight, out = np.array(described(layer), dtype=np.int64), filled.numpy()
    _prepare(x, sums, rounded)
    if x.size * layer.out_features >= _WORTH_SHARING:
        words = np.zeros(WORDS * 5, np.int64)
        pack((weight, x, sums, rounded, out), words)
        team().run(_part_address(), words)
    else:
        _product(weight, x, sums, rounded, out, 0, 1)
    return filled[:, : layer.out_features]


def _part(thread: int, threads: int, _: int, words: Any) -> None:
    words = carray(words, (WORDS * 5,), np.int64)
    x, sums, rounded = array2(words, 1, np.float32), array2(words, 2, np.float32), array2(words, 3, np.int8)
    _product(array1(words, 0, np.int64), x, sums, rounded, array2(words, 4, np.float32), thread, threads)


@cache
def _part_address() -> int:
    return address_of(_part, PART)


@compiled()
def _prepare(x: np.ndarray, sums: np.ndarray, rounded: np.ndarray) -> None:
    for row in range(len(x)):
        if rounded.size:
            round_row(x[row], rounded[row], sums[row])
        else:
            block_sums(x[row], sums[row])


@compiled()
def _product(
    weight: np.ndarray,
    x: np.ndarray,
    sums: np.ndarray,
    rounded: np.ndarray,
    out: np.ndarray,
    thread: int,
    threads: int,
) -> None:
    multiply_part(weight, x, sums, rounded, sums, out, 0, False, thread, threads, np.empty(CALL, np.int64))
