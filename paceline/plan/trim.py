"""The trim stage: keep the nodes of the whole batch that are worth their verification time.

The best set of a given size is the top of all nodes by survival (a parent's is never below its child's, and ties keep
parents first), so one sort and one prefix sum value every size. All sizes are evaluated: time is a step function
where kernels tile, and stopping at the first drop would miss what lies behind a step.

Trees whose tokens were *sampled* are kept whole: whether a sampled token is verified must not depend on anything
drawn after it (systems that cut them by confidence change the output's law).
"""

from __future__ import annotations

import numpy as np

from paceline.engine.types import DraftBatch, SpecPlan


def trim(drafts: DraftBatch, plan: SpecPlan) -> DraftBatch:
    """The drafts that are verified."""
    if plan.price is None and drafts.num_nodes <= plan.bucket:
        return drafts
    sizes = [0 if tree.sampled else len(tree) for tree in drafts.trees]
    if not sum(sizes):
        return drafts
    survival = np.concatenate([t.survival for t in drafts.trees if not t.sampled])
    order = np.argsort(-survival, kind="stable")[: plan.bucket]
    if plan.price is not None:
        kept_anyway = drafts.num_nodes - sum(sizes)
        times = plan.price.times[min(kept_anyway, len(plan.price.times) - 1) :]
        order = order[: len(times) - 1]
        value = np.cumsum(survival[order]) - plan.price.goodput * (times[1 : len(order) + 1] - times[0])
        best = int(value.argmax()) if len(value) else 0
        order = order[: best + 1] if len(value) and value[best] > 0.0 else order[:0]
    keep = np.zeros(len(survival), dtype=np.bool_)
    keep[order] = True
    trees = []
    start = 0
    for tree, size in zip(drafts.trees, sizes, strict=True):
        trees.append(tree if tree.sampled else tree.keep(np.flatnonzero(keep[start : start + size])))
        start += size
    return DraftBatch(tuple(trees), drafts.seconds)
