"""Fixed lengths: every drafter proposes up to its k nodes for every request, whatever it costs."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import PLAIN, DrafterLimits, room
from paceline.plan.survival import AcceptanceEstimates


class FixedLength:
    """The policy most engines offer, and the baseline of the others.

    Args:
        drafters: with `most` as their fixed lengths.
        estimates: only for the order of nodes when memory runs short.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates) -> None:
        self._limits = {d.name: d.most for d in drafters}
        self._estimates = estimates

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """The same plan in every step."""
        total = sum(self._limits.values())
        budgets = room(batch, max_model_len, total)
        if not any(budgets):
            return PLAIN
        return SpecPlan(budgets, tuple(self._limits), sum(budgets), self._estimates.of_batch(batch), self._limits)

    def learn(self, stats: StepStats) -> None:
        """Keep the estimates current."""
        self._estimates.learn(stats.labels)
