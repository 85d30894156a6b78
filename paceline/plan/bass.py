"""BASS (2404.15778): one length for the batch that grows after full acceptance and shrinks after misses.

If some request accepted all l drafted tokens, l grows by 2 (to 32 at most); else l shrinks by ceil(l / 10), and by one
more if it shrank just before, but not below the longest acceptance of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from paceline.engine.request import Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, sampling
from paceline.plan.lengths import plan_lengths
from paceline.plan.survival import AcceptanceEstimates

_FIRST, _GROW, _MODULUS, _LIMIT = 7, 2, 10, 32


class BassLength:
    """The rule.

    Args:
        drafters: with `most` as their caps.
        estimates: only for the order of nodes when memory runs short.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates) -> None:
        self._drafters = tuple(drafters)
        self._estimates = estimates
        self.length = _FIRST
        self._shrank = 0

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """The current length for everybody."""
        asked = sampling(batch, self._estimates.requests, max_model_len, sum(d.most for d in self._drafters))
        return plan_lengths(asked, np.full(len(asked), self.length), self._drafters, self._estimates)

    def learn(self, stats: StepStats) -> None:
        """Grow or shrink."""
        self._estimates.learn(stats)
        if stats.num_draft_nodes:
            self.update([int(count) - 1 for count in stats.committed])

    def update(self, accepted: Sequence[int]) -> None:
        """Take in the accepted lengths of a step."""
        longest = max(accepted)
        if longest >= self.length:
            self.length, self._shrank = min(self.length + _GROW, _LIMIT), 0
        else:
            shorter = self.length - math.ceil(self.length / _MODULUS) - self._shrank
            self.length, self._shrank = max(1, longest, shorter), 1

    def forget(self, request: Request) -> None:
        """Drop a finished request's estimates."""
        self._estimates.forget(request)
