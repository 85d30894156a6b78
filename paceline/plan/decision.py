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
from paceline.engine.draft_progress import DraftProgress, KeepDrafting
from paceline.plan.base import DrafterLimits
from paceline.plan.fixed import FixedLength
from paceline.plan.heads import DecisionHead
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


class DecisionLength(FixedLength):
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
        super().__init__(drafters, estimates)
        self._keep = DecisionStop(head, p)

    def _stop(self, num_requests: int) -> KeepDrafting:  # noqa: ARG002
        return self._keep
