"""What a policy could do that knew which draft tokens are right: an upper bound, for replays only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.engine.request import Request
from paceline.engine.types import StepStats
from paceline.plan.survival import AcceptanceEstimates

_CERTAIN = 1e-9


class OracleEstimates(AcceptanceEstimates):
    """Estimates that are the truth. Confidence class 1 means right, 0 wrong.

    Args:
        name: the drafter.
        right: draft tokens that would be accepted if the request drafted now.
    """

    def __init__(self, name: str, right: Callable[[Request], int]) -> None:
        super().__init__({name: np.array([0.0, 1.0])})
        self._right = right

    def of_batch(self, requests: Sequence[Request], _rows: IntArray, names: Iterable[str]) -> dict[str, FloatArray]:
        """The truth by class.  # [len(requests), 2]"""
        table = np.tile([_CERTAIN, 1.0 - _CERTAIN], (len(requests), 1))
        return dict.fromkeys(names, table)

    def by_depth(self, _name: str, requests: Sequence[Request], _rows: IntArray, depth: int) -> FloatArray:
        """1 as deep as the draft is right, then 0.  # [len(requests), depth]"""
        right = np.array([self._right(request) for request in requests])
        return (np.arange(depth)[None] < right[:, None]).astype(np.float64)

    def learn(self, stats: StepStats) -> None:
        """There is nothing to learn."""
