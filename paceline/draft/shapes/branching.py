"""Fixed branching: every node of a level has the same number of children.

How siblings are drawn follows the rule. Under `recursive` they are drawn without replacement by Gumbel-top-k: that is
RSD-C (2402.14160). Under `multi` they are drawn independently (SpecInfer 2305.09781). Under `coupled` they are the
tokens that the position's noise ranks first.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.arrays import FloatArray
from paceline.draft.scored import Scored
from paceline.draft.shapes.base import PRIOR, Child, Growth, children_of
from paceline.engine.draft_tree import Origin
from paceline.errors import ConfigError


class BranchingShape:
    """The shape.

    Args:
        origin: how siblings are drawn.
        widths: children of a node, level by level; levels beyond have one.

    Raises:
        ConfigError: a width is not positive.
    """

    name = "branching"
    prior = PRIOR
    by_rank = False

    def __init__(self, origin: Origin, widths: Sequence[int] = (3, 2, 1)) -> None:
        if not widths or min(widths) < 1:
            raise ConfigError("the widths of a tree must be at least 1.", field="tree", fix="Write widths=3/2/1.")
        self.origin = origin
        self._widths = tuple(widths)
        sizes = level_sizes(self._widths)
        self.width = sum(sizes) / len(sizes)

    def start(self, budget: int, depth: int, acceptance: FloatArray | None) -> Growth:  # noqa: ARG002
        """An empty tree."""
        return _Branching(self._widths, budget, depth, distinct=self.origin is not Origin.INDEPENDENT)


class KaryShape(BranchingShape):
    """Every node has `k` children, down to the level that the budget still fills.

    Args:
        origin: how siblings are drawn.
        k: children of a node.
    """

    name = "k-ary"

    def __init__(self, origin: Origin, k: int = 2) -> None:
        super().__init__(origin, (k,) * 12)
        self.width = float(k * k)


def level_sizes(widths: Sequence[int]) -> list[int]:
    """Nodes of every level."""
    sizes, size = [], 1
    for width in widths:
        size *= width
        sizes.append(size)
    return sizes


class _Branching:
    def __init__(self, widths: Sequence[int], budget: int, depth: int, *, distinct: bool) -> None:
        self._widths = widths
        self._left = budget
        self._depth = depth
        self._distinct = distinct

    def grow(self, scored: Sequence[Scored], next_node: int) -> Sequence[Child]:  # noqa: ARG002
        level = scored[0].depth
        width = self._widths[level] if level < len(self._widths) else 1
        children: list[Child] = []
        for parent in scored:  # how many children a node has depends on the place it has, not on what was drawn
            room = min(width, self._left)
            if room:
                expand = level + 1 < self._depth
                children += children_of(parent, room, expand=expand, distinct=self._distinct)
                self._left -= room
        return children if self._left else [Child(c.parent, c.token, c.key, expand=False) for c in children]

    def finish(self, next_node: int) -> Sequence[Child]:  # noqa: ARG002
        return ()
