"""CaPE (2402.02082): a greedy path, and beside each of its nodes more siblings the less sure the draft model is.

By the largest probability c of the draft law: 7 siblings below 0.3, 5 below 0.6, 3 below 0.8, else 1. They are leaves,
and they are chosen, so under other rules than `coupled` they are point masses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.arrays import FloatArray
from paceline.draft.scored import Scored
from paceline.draft.shapes.base import PRIOR, Child, Growth, children_of
from paceline.engine.draft_tree import Origin

_CANDIDATES = ((0.3, 8), (0.6, 6), (0.8, 4))
_LEAST = 2


class CapeShape:
    """The shape."""

    name = "cape"
    origin = Origin.CHOSEN
    prior = PRIOR
    width = 4.0
    by_rank = False

    def __init__(self, origin: Origin) -> None:
        """`origin` is ignored: the tokens are chosen."""

    def start(self, budget: int, depth: int, acceptance: FloatArray | None) -> Growth:  # noqa: ARG002
        """An empty tree."""
        return _Cape(budget, depth, self.candidates)

    def candidates(self, confidence: float) -> int:
        """Tokens tried after a draft law whose largest probability is `confidence`."""
        return next((count for bound, count in _CANDIDATES if confidence < bound), _LEAST)


class _Cape:
    def __init__(self, budget: int, depth: int, candidates: Callable[[float], int]) -> None:
        self._left = budget
        self._levels = depth
        self._candidates = candidates

    def grow(self, scored: Sequence[Scored], next_node: int) -> Sequence[Child]:  # noqa: ARG002
        """The next node of the path and its siblings, as far as the budget goes."""
        (parent,) = scored
        self._levels -= 1
        count = min(self._candidates(parent.confidence), self._left)
        self._left -= count
        children = children_of(parent, count, expand=False)
        if children and self._levels > 0 and self._left > 0:
            first = children[0]
            children[0] = Child(first.parent, first.token, first.key, expand=True)
        return children

    def finish(self, next_node: int) -> Sequence[Child]:  # noqa: ARG002
        return ()
