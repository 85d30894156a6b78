"""Plans in which every request gets a given length, whatever its drafts look like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.arrays import IntArray
from paceline.engine.draft_progress import KeepDrafting
from paceline.engine.types import Cut, SpecPlan
from paceline.plan.base import PLAIN, DrafterLimits, Sampling
from paceline.plan.survival import AcceptanceEstimates


def plan_lengths(
    asked: Sampling,
    lengths: IntArray,
    drafters: Sequence[DrafterLimits],
    estimates: AcceptanceEstimates,
    cut: Cut | None = None,
    keep_drafting: KeepDrafting | None = None,
) -> SpecPlan:
    """Ask every drafter for `lengths[i]` nodes (at most its cap) for request i; all are verified unless `cut` drops
    some. A drafter with a fixed length keeps it.

    Args:
        asked: the step's requests.
        lengths: nodes per request and drafter.  # [num_sampling]
        drafters: who is asked.
        estimates: for the order of nodes when memory runs short.
        cut: see `SpecPlan.cut`.
        keep_drafting: see `SpecPlan.keep_drafting`.
    """
    limits: dict[str, int | IntArray] = {
        d.name: d.most if d.fixed else np.minimum(lengths, d.most)
        for d in drafters
        if d.most and (d.fixed or lengths.any())
    }
    if not limits or not asked.room.any():
        return PLAIN
    return SpecPlan(
        budgets=asked.room,
        drafters=tuple(limits),
        bucket=int(asked.room.sum()),
        acceptance=estimates.of_batch(asked.requests, asked.rows, limits),
        limits=limits,
        cut=cut,
        fixed=frozenset(d.name for d in drafters if d.fixed),
        keep_drafting=keep_drafting,
    )
