"""The decision model of improved multi-candidate decoding (2409.10644): a small network judges every draft law.

It sees entropy and the ten largest probabilities of the law that the newest (likeliest) token was drawn from, and
drafting goes on while it gives the token more than `p` to be accepted. The paper's *verification* (candidates of the
first level from the target, the longest matching path kept) changes the output even at temperature 0 and is not
offered; its decision model is exact under any rule here, since it looks at laws of tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paceline.arrays import BoolArray
from paceline.engine.draft_progress import DraftProgress
from paceline.engine.request import Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, sampling
from paceline.plan.heads import DecisionHead
from paceline.plan.lengths import plan_lengths
from paceline.plan.survival import AcceptanceEstimates


class DecisionStop:
    """Asks for another token while the head gives the newest one more than `p`."""

    wants_hidden = False
    wants_top_probabilities = True

    def __init__(self, head: DecisionHead, p: float) -> None:
        self._head = head
        self._p = p

    @torch.inference_mode()
    def keep(self, progress: DraftProgress) -> BoolArray:
        """Whose newest token will probably be accepted.  # [n]"""
        assert progress.top_probabilities is not None, "they were asked for"
        features = np.column_stack([progress.entropy, progress.top_probabilities])  # [n, 11]
        accepted = self._head(torch.from_numpy(features).float())[:, 1].exp()
        return np.asarray(accepted.numpy() > self._p)


class DecisionLength:
    """The policy. Drafters that take no forwards of their own propose up to their caps.

    Args:
        drafters: with `most` as their caps.
        estimates: only for the order of nodes when memory runs short.
        head: judges laws.
        p: probability of acceptance that a token must exceed.
    """

    def __init__(
        self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, *, head: DecisionHead, p: float = 0.5
    ) -> None:
        self._drafters = tuple(drafters)
        self._most = sum(d.most for d in drafters)
        self._estimates = estimates
        self._stop = DecisionStop(head, p)

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """Up to the caps, and the stop."""
        asked = sampling(batch, self._estimates.requests, max_model_len, self._most)
        lengths = np.full(len(asked), self._most)
        return plan_lengths(asked, lengths, self._drafters, self._estimates, keep_drafting=self._stop)

    def learn(self, stats: StepStats) -> None:
        """Keep the estimates current."""
        self._estimates.learn(stats)

    def forget(self, request: Request) -> None:
        """Drop a finished request's estimates."""
        self._estimates.forget(request)
