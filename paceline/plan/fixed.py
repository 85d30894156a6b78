"""Fixed lengths: every drafter proposes up to its k nodes for every request, whatever it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.engine.draft_progress import KeepDrafting
from paceline.engine.request import Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, sampling
from paceline.plan.lengths import plan_lengths
from paceline.plan.survival import AcceptanceEstimates


class FixedLength:
    """The policy most engines offer, and the baseline of the others.

    Args:
        drafters: with `most` as their fixed lengths.
        estimates: only for the order of nodes when memory runs short.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates) -> None:
        self._drafters = tuple(drafters)
        self._most = sum(d.most for d in drafters)
        self._estimates = estimates

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """The same plan in every step."""
        asked = sampling(batch, self._estimates.requests, max_model_len, self._most)
        lengths, stop = np.full(len(asked), self._most), self._stop(len(asked))
        return plan_lengths(asked, lengths, self._drafters, self._estimates, keep_drafting=stop)

    def _stop(self, num_requests: int) -> KeepDrafting | None:  # noqa: ARG002
        """What ends the drafts of this step before their length; policies that only differ in it derive from this."""
        return None

    def learn(self, stats: StepStats) -> None:
        """Keep the estimates current."""
        self._estimates.learn(stats)

    def forget(self, request: Request) -> None:
        """Drop a finished request's estimates."""
        self._estimates.forget(request)
