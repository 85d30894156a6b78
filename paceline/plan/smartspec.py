"""SmartSpec as published (2406.14066): one length for the whole batch that maximises estimated goodput.

A moving average of the acceptance rate (0.7 at first, then 0.85 of the old and 0.15 of the new), independent trials
for the expected length, the profiled time of a step, and a search over k = 0, 1, 2, ... that stops at the first drop;
k = 0 gets a bonus of 1.1. Decided anew every 20 steps. At k = 0 nothing is observed, so it can stay there for good;
that is how it was published, and why `auto` drafts in shadow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.engine.request import Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, sampling
from paceline.plan.cost_model import CostModel
from paceline.plan.lengths import plan_lengths
from paceline.plan.survival import AcceptanceEstimates

_FIRST_RATE = 0.7
_MEMORY = 0.85
_ZERO_BONUS = 1.1
_EVERY = 20


class SmartSpec:
    """The global form.

    Args:
        drafters: with `most` as the largest k.
        estimates: only for the order of nodes when memory runs short.
        cost: what steps take.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, cost: CostModel) -> None:
        self._drafters = tuple(drafters)
        self._most = max(d.most for d in drafters)
        self._estimates = estimates
        self._cost = cost
        self._rate = _FIRST_RATE
        self._length = 0
        self._steps = 0

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """The current k for everybody."""
        asked = sampling(batch, self._estimates.requests, max_model_len, sum(d.most for d in self._drafters))
        if len(asked):
            if self._steps % _EVERY == 0:
                context = sum(item.start + item.num_tokens for item in batch.items)
                self._length = self._best(batch.num_tokens, len(batch.items), len(asked), context)
            self._steps += 1
        return plan_lengths(asked, np.full(len(asked), self._length), self._drafters, self._estimates)

    def learn(self, stats: StepStats) -> None:
        """Update the acceptance rate."""
        self._estimates.learn(stats)
        self._cost.learn(stats)
        if stats.num_draft_nodes:
            observed = (stats.num_committed - stats.num_sampling) / stats.num_draft_nodes
            self._rate = _MEMORY * self._rate + (1.0 - _MEMORY) * observed

    def forget(self, request: Request) -> None:
        """Drop a finished request's estimates."""
        self._estimates.forget(request)

    def _best(self, num_committed: int, sequences: int, requests: int, context: float) -> int:
        most = sum(d.most for d in self._drafters)
        times = self._cost.step_seconds(num_committed, most * requests, sequences, context)
        best, best_goodput = 0, _ZERO_BONUS * requests / float(times[0])
        for k in range(1, self._most + 1):
            length = sum(self._rate**i for i in range(k + 1))
            drafting = sum(self._cost.draft_seconds(d.name, k, requests) for d in self._drafters if d.cost_per_token)
            nodes = requests * sum(min(k, d.most) for d in self._drafters)
            goodput = requests * length / (float(times[nodes]) + drafting)
            if goodput < best_goodput:
                break
            best, best_goodput = k, goodput
        return best
