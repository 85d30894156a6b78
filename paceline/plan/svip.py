"""SVIP (2411.18462): a draft model goes on while it is sure of itself.

By Pinsker's inequality a draft token's acceptance is at least 1 - sqrt(KL(q || p) / 2). The divergence is unknown while
drafting; the paper takes it as proportional to the entropy H of the draft law, so that the bound is 1 - sqrt(c H), and
drafts on while sqrt(c H) <= h. The token drawn from that law is kept either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.arrays import BoolArray
from paceline.engine.draft_progress import DraftProgress, KeepDrafting
from paceline.plan.base import DrafterLimits
from paceline.plan.fixed import FixedLength
from paceline.plan.survival import AcceptanceEstimates


class EntropyStop:
    """Asks for another token while sqrt(c * entropy) <= h."""

    wants_hidden = False
    wants_top_probabilities = False

    def __init__(self, h: float, c: float) -> None:
        self._h = h
        self._c = c

    def keep(self, progress: DraftProgress) -> BoolArray:
        """Whose newest law was sure enough.  # [n]"""
        return np.asarray(np.sqrt(self._c * np.maximum(progress.entropy, 0.0)) <= self._h)


class SvipLength(FixedLength):
    """The policy. Drafters that take no forwards of their own propose up to their caps.

    Args:
        drafters: with `most` as their caps.
        estimates: only for the order of nodes when memory runs short.
        h: largest bound on rejection at which drafting goes on.
        c: the paper's constant between divergence and entropy.
    """

    def __init__(
        self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, *, h: float = 0.3, c: float = 0.15
    ) -> None:
        super().__init__(drafters, estimates)
        self._keep = EntropyStop(h, c)

    def _stop(self, num_requests: int) -> KeepDrafting:  # noqa: ARG002
        return self._keep
