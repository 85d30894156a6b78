"""A chain: every node has one child."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.arrays import FloatArray
from paceline.draft.scored import Scored
from paceline.draft.shapes.base import PRIOR, Child, Growth, children_of
from paceline.engine.draft_tree import Origin


class ChainShape:
    """The shape of a plain draft model (Leviathan et al. 2211.17192, Chen et al. 2302.01318)."""

    name = "chain"
    prior = PRIOR
    width = 1.0
    by_rank = False

    def __init__(self, origin: Origin) -> None:
        self.origin = Origin.CHOSEN if origin is Origin.CHOSEN else Origin.DISTINCT

    def start(self, budget: int, depth: int, acceptance: FloatArray | None) -> Growth:  # noqa: ARG002
        """An empty chain."""
        return _Chain(min(budget, depth))


class _Chain:
    def __init__(self, length: int) -> None:
        self._left = length

    def grow(self, scored: Sequence[Scored], next_node: int) -> Sequence[Child]:  # noqa: ARG002
        self._left -= 1
        return children_of(scored[-1], 1, expand=self._left > 0)

    def finish(self, next_node: int) -> Sequence[Child]:  # noqa: ARG002
        return ()
