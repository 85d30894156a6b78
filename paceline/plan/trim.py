"""The trim stage: keep the nodes of the whole batch that are worth their verification time.

The best set of a given size is the top of all nodes by worth: survival times the request's weight (a parent's is never
below its child's, and ties keep parents first). So one sort values every size, and the plan's cut chooses one.

Trees whose tokens were *sampled* are kept whole: whether a sampled token is verified must not depend on anything
drawn after it (systems that cut them by confidence change the output's law). Nodes of drafters with a fixed length
are kept as well.
"""

from __future__ import annotations

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree
from paceline.engine.types import Candidates, DraftBatch, SpecPlan


def trim(drafts: DraftBatch, plan: SpecPlan) -> DraftBatch:
    """The drafts that are verified."""
    if plan.cut is None and drafts.num_nodes <= plan.bucket:
        return drafts
    trees = drafts.trees
    sizes = np.array([len(tree) for tree in trees], dtype=np.int64)
    if not sizes.any():
        return drafts
    survival = np.concatenate([tree.survival for tree in trees])
    request = np.repeat(np.arange(len(trees)), sizes)
    stays = _stays(trees, plan.fixed)
    worth = survival if plan.weights is None else survival * plan.weights[request]
    order = np.argsort(-worth, kind="stable")
    if stays is not None:
        order = order[~stays[order]]
    fixed = np.bincount(request[:0] if stays is None else request[stays], minlength=len(trees))
    candidates = Candidates(survival[order], request[order], fixed)
    size = len(order) if plan.cut is None else plan.cut.size(candidates)
    size = min(size, max(0, plan.bucket - int(fixed.sum())))
    keep = np.zeros(len(survival), dtype=np.bool_) if stays is None else stays.copy()
    keep[order[:size]] = True
    return DraftBatch(_cut(trees, sizes, keep), drafts.seconds, _slot_price(candidates.survival, size))


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


def _cut(trees: tuple[DraftTree, ...], sizes: IntArray, keep: BoolArray) -> tuple[DraftTree, ...]:
    """Each tree with the nodes it keeps."""
    ends = np.cumsum(sizes)
    kept = np.add.reduceat(keep, np.minimum(ends - sizes, len(keep) - 1), dtype=np.int64)
    return tuple(
        tree if n == size or not size else EMPTY_TREE if not n else tree.keep(np.flatnonzero(keep[end - size : end]))
        for tree, size, end, n in zip(trees, sizes.tolist(), ends.tolist(), kept.tolist(), strict=True)
    )


def _slot_price(survival: FloatArray, size: int) -> float:
    return float(survival[size - 1]) if size else 1.0
