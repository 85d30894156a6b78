"""Sequoia (2402.12374): the tree that is best for the acceptance of first, second, third siblings, and so on.

A node's class is its rank among its siblings, so what the plan measures by class is the positional acceptance vector
the tree is made of: of the labelled nodes of rank b (those whose parent was accepted), the share that was accepted.
The tree is fixed before anything is drawn. Its siblings are drawn as the rule needs them: without replacement under
`recursive`, independently under `multi`, ranked by the position's noise under `coupled`.

Ranks that no tree had yet keep their prior, which falls slowly: they are tried as soon as they would pay if they were
that good, and are known from then on. An estimate is believed only as far as its rank and the ranks before it allow
(`engine.positional.positional`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.arrays import FloatArray
from paceline.draft.scored import Scored
from paceline.draft.shapes.base import Child, Growth
from paceline.engine.draft_tree import Origin
from paceline.engine.positional import RANKS, TreeNode, positional, tree_table

PRIOR: FloatArray = np.asarray(0.5 / np.arange(1, RANKS + 1) ** 1.7, dtype=np.float64)
_TYPICAL = 32


class SequoiaShape:
    """The shape.

    Args:
        origin: how siblings are drawn.
    """

    name = "sequoia"
    prior = PRIOR
    by_rank = True

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        tree = tree_table(positional(PRIOR), _TYPICAL, _TYPICAL).tree(_TYPICAL, _TYPICAL)
        self.width = len(tree) / _levels(tree)

    def start(self, budget: int, depth: int, acceptance: FloatArray | None) -> Growth:
        """The best tree for these estimates, without tokens."""
        vector = positional(self.prior if acceptance is None else acceptance)
        tree = tree_table(vector, budget, depth).tree(budget, depth)
        return _Planned(tree, distinct=self.origin is not Origin.INDEPENDENT)


def _levels(tree: Sequence[TreeNode]) -> int:
    depths: list[int] = []
    for node in tree:
        depths.append(1 + (depths[node.parent] if node.parent >= 0 else 0))
    return max(depths)


class _Planned:
    """A tree whose places are known before its tokens are."""

    def __init__(self, tree: Sequence[TreeNode], *, distinct: bool) -> None:
        self._children: dict[int, list[int]] = {}  # place -> places below it
        for place, node in enumerate(tree):
            self._children.setdefault(node.parent, []).append(place)
        self._place = {-1: -1}  # node -> place
        self._distinct = distinct

    def grow(self, scored: Sequence[Scored], next_node: int) -> Sequence[Child]:
        made: list[Child] = []
        for parent in scored:
            places = self._children.get(self._place[parent.node], [])
            for rank, (token, place) in enumerate(zip(self._tokens(parent, len(places)), places, strict=False)):
                self._place[next_node + len(made)] = place
                made.append(Child(parent.node, token, rank, expand=place in self._children))
        return made

    def finish(self, next_node: int) -> Sequence[Child]:  # noqa: ARG002
        return ()

    def _tokens(self, parent: Scored, count: int) -> Sequence[int]:
        """Fewer than `count` where the law has no more."""
        return parent.ranked(count).tokens if self._distinct else parent.independent(count)
