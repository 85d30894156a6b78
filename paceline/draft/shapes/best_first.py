"""Best first: the tree holds the nodes of greatest cumulative draft probability (Staged 2308.04623).

Every forward expands the most probable nodes that are not expanded yet; when drafting ends, what is left of the budget
is filled with the most probable leaves. The tokens are chosen, not drawn, so under other rules than `coupled` they are
point masses.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from paceline.arrays import FloatArray
from paceline.draft.scored import Scored
from paceline.draft.shapes.base import PRIOR, Child, Growth, check_counts, children_of
from paceline.engine.draft_tree import Origin


class BestFirstShape:
    """The shape.

    Args:
        origin: ignored; the tokens are chosen.
        expand: nodes that one forward expands.
        width: children considered of every node.

    Raises:
        ConfigError: a number is impossible.
    """

    name = "best-first"
    origin = Origin.CHOSEN
    prior = PRIOR
    by_rank = False

    def __init__(self, origin: Origin, expand: int = 3, width: int = 6) -> None:  # noqa: ARG002
        check_counts("expand", [expand], "best-first:expand=3,width=6")
        check_counts("the width", [width], "best-first:expand=3,width=6")
        self._expand = expand
        self._children = width
        self.width = float(expand)

    def start(self, budget: int, depth: int, acceptance: FloatArray | None) -> Growth:  # noqa: ARG002
        """An empty tree."""
        return _BestFirst(self._expand, self._children, budget, depth)


class _BestFirst:
    def __init__(self, expand: int, width: int, budget: int, depth: int) -> None:
        self._expand = expand
        self._width = width
        self._left = budget
        self._levels = depth
        self._cost = {-1: 0.0}  # minus the log-probability of the path
        self._waiting: list[tuple[float, int, Child]] = []
        self._seen = 0

    def grow(self, scored: Sequence[Scored], next_node: int) -> Sequence[Child]:
        self._levels -= 1
        for parent in scored:
            for child, chance in zip(*self._children(parent), strict=True):
                cost = self._cost[parent.node] - float(np.log(max(chance, 1e-12)))
                heapq.heappush(self._waiting, (cost, self._seen, child))
                self._seen += 1
        expanding = self._levels > 0 and self._left > self._expand
        return self._take(self._expand, next_node) if expanding else ()

    def finish(self, next_node: int) -> Sequence[Child]:
        self._levels = 0
        return self._take(self._left, next_node)

    def _children(self, parent: Scored) -> tuple[list[Child], list[float]]:
        children = children_of(parent, self._width, expand=False)
        return children, parent.chances([c.token for c in children])

    def _take(self, count: int, next_node: int) -> list[Child]:
        taken = list[Child]()
        while self._waiting and len(taken) < count:
            cost, _, child = heapq.heappop(self._waiting)
            self._cost[next_node + len(taken)] = cost
            taken.append(Child(child.parent, child.token, child.key, expand=self._levels > 0))
        self._left -= len(taken)
        return taken
