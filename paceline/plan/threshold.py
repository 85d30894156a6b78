"""A confidence threshold: verify the draft nodes whose estimated survival reaches p, at every load.

The static form of what EAGLE-2, SVIP and others do with the draft's own confidences; here the confidences are
calibrated first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from paceline.engine.request import Request
from paceline.engine.types import Candidates, ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, Sampling, sampling
from paceline.plan.lengths import plan_lengths
from paceline.plan.survival import AcceptanceEstimates


@dataclass(frozen=True, slots=True)
class FloorCut:
    """Keeps nodes of at least this survival."""

    floor: float

    def size(self, candidates: Candidates) -> int:
        """How many reach it."""
        return int(np.count_nonzero(candidates.survival >= self.floor))


class ThresholdLength:
    """The policy.

    Args:
        drafters: with `most` as their caps.
        estimates: acceptance by class and request.
        p: the threshold.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, *, p: float = 0.4) -> None:
        self._drafters = tuple(drafters)
        self._most = sum(d.most for d in drafters)
        self._estimates = estimates
        self._cut = FloorCut(p)

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """A draft model drafts as deep as a typical request stays above the threshold, and at least one token."""
        asked = sampling(batch, self._estimates.requests, max_model_len, self._most)
        drafters = [self._capped(d, asked) if d.cost_per_token and len(asked) else d for d in self._drafters]
        return plan_lengths(asked, np.full(len(asked), self._most), drafters, self._estimates, self._cut)

    def _capped(self, drafter: DrafterLimits, asked: Sampling) -> DrafterLimits:
        if drafter.fixed or not drafter.most:
            return drafter
        levels = max(int(drafter.most / drafter.width), 1)
        survival = self._estimates.by_depth(drafter.name, asked.requests, asked.rows, levels).mean(axis=0)
        deepest = max(1, int(np.count_nonzero(survival >= self._cut.floor)))
        return replace(drafter, most=min(round(deepest * drafter.width), drafter.most))

    def learn(self, stats: StepStats) -> None:
        """Update acceptance."""
        self._estimates.learn(stats)

    def forget(self, request: Request) -> None:
        """Drop a finished request's estimates."""
        self._estimates.forget(request)
