"""Fixed branching: every node of a level has the same number of children.

How siblings are drawn follows the rule. Under `recursive` they are drawn without replacement by Gumbel-top-k: that is
RSD-C (2402.14160), which as `rsd-c` takes no rule that draws otherwise. Under `multi` they are drawn independently
(SpecInfer 2305.09781). Under `coupled` they are the tokens that the position's noise ranks first.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.arrays import FloatArray
from paceline.draft.scored import Scored
from paceline.draft.shapes.base import MOST, PRIOR, Child, Growth, check_counts, children_of
from paceline.engine.draft_tree import Origin
from paceline.errors import ConfigError

_WIDTHS = (3, 2, 1)


class BranchingShape:
    """The shape.

    Args:
        origin: how siblings are drawn.
        widths: children of a node, level by level; levels beyond have one.

    Raises:
        ConfigError: there are no or too many levels, or a width is impossible.
    """

    name = "branching"
    prior = PRIOR
    by_rank = False

    def __init__(self, origin: Origin, widths: Sequence[int] = _WIDTHS) -> None:
        check_counts("the number of levels", [len(widths)], f"{self.name}:widths=3/2/1")
        check_counts("a width", widths, f"{self.name}:widths=3/2/1")
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

    Raises:
        ConfigError: an impossible number of children.
    """

    name = "k-ary"

    def __init__(self, origin: Origin, k: int = 2) -> None:
        check_counts("k", [k], "k-ary:k=2")
        super().__init__(origin, (k,) * 12)
        self.width = float(min(k * k, MOST))


class ConstantBranchingShape(BranchingShape):
    """RSD-C: branching whose siblings never repeat.

    Args:
        origin: how siblings are drawn; independent draws are no RSD.
        widths: children of a node, level by level; levels beyond have one.

    Raises:
        ConfigError: the rule wants independent siblings, or the widths are impossible.
    """

    name = "rsd-c"

    def __init__(self, origin: Origin, widths: Sequence[int] = _WIDTHS) -> None:
        super().__init__(origin, widths)
        if origin is Origin.INDEPENDENT:
            raise ConfigError(
                "rsd-c draws without replacement, and rule multi is exact only for draws with replacement.",
                field="tree",
                fix=f"Use rule recursive or coupled with it, or tree branching:widths={'/'.join(map(str, widths))}.",
            )


def level_sizes(widths: Sequence[int]) -> list[int]:
    """Nodes of every level, as far as a draft can hold them."""
    sizes, size = [], 1
    for width in widths:
        size = min(size * width, MOST)
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
