"""The trim stage: keep the nodes of the whole batch that are worth their verification time.

The best set of a given size is the top of all nodes by worth: survival times the request's weight (a parent's is never
below its child's, and ties keep parents first). So one sort values every size, and the plan's cut chooses one.

Trees whose tokens were *sampled* are kept whole: whether a sampled token is verified must not depend on anything
drawn after it (systems that cut them by confidence change the output's law). Nodes of drafters with a fixed length
are kept as well.
"""

from __future__ import annotations

import numpy as np

from paceline.arrays import BoolArray
from paceline.engine.draft_tree import DraftTree
from paceline.engine.types import Candidates, DraftBatch, SpecPlan

_NONE = np.empty(0)


def trim(drafts: DraftBatch, plan: SpecPlan) -> DraftBatch:
    """The drafts that are verified."""
    trees = drafts.trees
    parts = [tree.survival for tree in trees]
    survival = parts[0] if len(parts) == 1 else np.concatenate([*parts, _NONE])
    if not len(survival) or (plan.cut is None and len(survival) <= plan.bucket):
        return drafts
    request = np.arange(len(parts)).repeat([len(part) for part in parts])
    worth = survival if plan.weights is None else survival * plan.weights[request]
    order = (-worth).argsort(kind="stable")
    stays = _stays(trees, plan.fixed)
    if stays is None:
        fixed = np.zeros(len(trees), dtype=np.int64)
    else:
        order = order[~stays[order]]
        fixed = np.bincount(request[stays], minlength=len(trees))
    candidates = Candidates(survival[order], request[order], fixed)
    size = len(order) if plan.cut is None else plan.cut.size(candidates)
    size = min(size, max(0, plan.bucket - int(fixed.sum())))
    price = candidates.survival.item(size - 1) if size else 1.0
    if size == len(order):
        return DraftBatch(trees, drafts.seconds, price)
    keep = np.zeros(len(survival), dtype=np.bool_) if stays is None else stays
    keep[order[:size]] = True
    return DraftBatch(trees, drafts.seconds, price, keep)


def _stays(trees: tuple[DraftTree, ...], fixed: frozenset[str]) -> BoolArray | None:
    """Nodes that no cut may drop; None if there are none.  # [nodes of all trees]"""
    if not fixed and not any(tree.sampled for tree in trees):
        return None
    parts = []
    for tree in trees:
        mine = np.array([tree.sampled or name in fixed for name in tree.drafter], dtype=np.bool_)
        for node, name, _ in tree.shared:
            mine[node] |= name in fixed
        parts.append(mine)
    return np.concatenate(parts)
