"""SmartSpec per request: rank all drafted tokens by cumulative confidence and verify while goodput rises.

The estimated goodput of a step that verifies the n best nodes is (requests + their survival) / time; growing stops at
the first drop. Unlike `auto` it looks at one step alone and never past a drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.arrays import FloatArray
from paceline.engine.request import Request
from paceline.engine.types import Candidates, ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, sampling
from paceline.plan.cost_model import CostModel
from paceline.plan.lengths import plan_lengths
from paceline.plan.survival import AcceptanceEstimates


@dataclass(frozen=True, slots=True)
class RatioCut:
    """Maximises the ratio of one step, greedily."""

    times: FloatArray  # [most + 1]

    def size(self, candidates: Candidates) -> int:
        """Nodes before the first drop of expected tokens per second."""
        fixed = min(int(candidates.fixed.sum()), len(self.times) - 1)
        times = self.times[fixed:]
        most = min(len(candidates.survival), len(times) - 1)
        tokens = len(candidates.fixed) + np.concatenate([[0.0], np.cumsum(candidates.survival[:most])])
        drops = np.flatnonzero(np.diff(tokens / times[: most + 1]) < 0.0)
        return int(drops[0]) if len(drops) else most


class SmartSpecPerRequest:
    """The per-request form.

    Args:
        drafters: with `most` as their caps; draft models always draft that much.
        estimates: acceptance by class and request.
        cost: what steps take.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, cost: CostModel) -> None:
        self._drafters = tuple(drafters)
        self._most = sum(d.most for d in drafters)
        self._estimates = estimates
        self._cost = cost

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """Everything is drafted; the cut decides."""
        asked = sampling(batch, self._estimates.requests, max_model_len, self._most)
        context = sum(item.start + item.num_tokens for item in batch.items)
        times = self._cost.step_seconds(batch.num_tokens, int(asked.room.sum()), len(batch.items), context)
        lengths = np.full(len(asked), self._most)
        return plan_lengths(asked, lengths, self._drafters, self._estimates, RatioCut(times))

    def learn(self, stats: StepStats) -> None:
        """Update acceptance and costs."""
        self._estimates.learn(stats)
        self._cost.learn(stats)

    def forget(self, request: Request) -> None:
        """Drop a finished request's estimates."""
        self._estimates.forget(request)
