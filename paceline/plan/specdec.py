"""SpecDec++ (2405.19715): a trained head says when some drafted token will probably be rejected.

Drafting goes on while 1 - prod a_i <= h, with a_i the head's probability that token i is accepted if those before it
were. The head reads the draft model's hidden state after token i was fed, so a judgement lags one draft forward and the
last token is never judged. Between 2 and 20 tokens are drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from paceline.arrays import BoolArray
from paceline.engine.draft_progress import DraftProgress, KeepDrafting
from paceline.errors import UnsupportedModelError
from paceline.plan.base import DrafterLimits
from paceline.plan.fixed import FixedLength
from paceline.plan.heads import AcceptanceHead
from paceline.plan.survival import AcceptanceEstimates

_LEAST, _MOST = 2, 20


class AcceptanceStop:
    """The stop of one step: it multiplies the judgements of every request.

    Args:
        head: judges tokens.
        h: stop when the probability of a rejection exceeds it.
        num_requests: of the step.
    """

    wants_hidden = True
    wants_top_probabilities = False

    def __init__(self, head: AcceptanceHead, h: float, num_requests: int) -> None:
        self._head = head
        self._h = h
        self._all_accepted = np.ones(num_requests)

    @torch.inference_mode()
    def keep(self, progress: DraftProgress) -> BoolArray:
        """Who will probably have everything accepted that was judged.  # [n]"""
        rows = progress.rows
        if progress.depth < _LEAST:  # the state is that of a committed token, which needs no judgement
            return np.ones(len(rows), dtype=np.bool_)
        hidden = progress.hidden
        assert hidden is not None, "it was asked for"
        accepted = self._head.to(hidden.device)(hidden.float())[:, 1].exp()
        self._all_accepted[rows] *= accepted.double().cpu().numpy()
        return np.asarray(1.0 - self._all_accepted[rows] <= self._h)


class SpecDecLength(FixedLength):
    """The policy. Drafters that take no forwards of their own propose up to their caps.

    Args:
        drafters: with `most` as their caps.
        estimates: only for the order of nodes when memory runs short.
        head: made for the draft model.
        h: stop when the probability of a rejection exceeds it.

    Raises:
        UnsupportedModelError: the head was made for hidden states of another size.
    """

    def __init__(
        self,
        drafters: Sequence[DrafterLimits],
        estimates: AcceptanceEstimates,
        *,
        head: AcceptanceHead,
        h: float = 0.7,
    ) -> None:
        for drafter in drafters:
            if drafter.hidden_size not in (None, head.inputs):
                raise UnsupportedModelError(
                    f"was made for hidden states of size {head.inputs}, and those of drafter {drafter.name} have "
                    f"{drafter.hidden_size}.",
                    field="head",
                    fix="Make one for this draft with `paceline train acceptance-head`.",
                )
        capped = [replace(d, most=min(d.most, _MOST)) if d.cost_per_token and not d.fixed else d for d in drafters]
        super().__init__(capped, estimates)
        self._head = head
        self._h = h

    def _stop(self, num_requests: int) -> KeepDrafting:
        return AcceptanceStop(self._head, self._h, num_requests)
