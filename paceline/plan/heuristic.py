"""The heuristic of transformers' assisted generation: a request's length grows by 2 when all its draft tokens were
accepted and shrinks by 1 when they were not, never below 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.engine.request import Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, sampling
from paceline.plan.lengths import plan_lengths
from paceline.plan.survival import AcceptanceEstimates

_FIRST = 5


class HeuristicLength:
    """The rule, apart for every request.

    Args:
        drafters: with `most` as their caps.
        estimates: only for the order of nodes when memory runs short.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates) -> None:
        self._drafters = tuple(drafters)
        self._most = max(d.most for d in drafters)
        self._estimates = estimates
        self._lengths: dict[Request, int] = {}

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """Each request's own length."""
        asked = sampling(batch, self._estimates.requests, max_model_len, sum(d.most for d in self._drafters))
        lengths = np.array([self._lengths.get(request, _FIRST) for request in asked.requests], dtype=np.int64)
        return plan_lengths(asked, lengths, self._drafters, self._estimates)

    def learn(self, stats: StepStats) -> None:
        """Grow or shrink those that had draft tokens."""
        self._estimates.learn(stats)
        for request, verified, committed in zip(stats.requests, stats.verified, stats.committed, strict=True):
            if verified:
                length = self._lengths.get(request, _FIRST)
                grown = length + 2 if committed > verified else length - 1
                self._lengths[request] = min(max(grown, 1), self._most)

    def forget(self, request: Request) -> None:
        """Drop a finished request's length."""
        self._lengths.pop(request, None)
        self._estimates.forget(request)
