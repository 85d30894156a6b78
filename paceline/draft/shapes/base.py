"""The tree shape protocol: how a draft model's tree grows, level by level.

A shape sees what the draft model says after each node (`Scored`) and answers with children; which of them are scored
next is its choice too. It never runs the model, never draws by itself, and knows nothing of other requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paceline.arrays import FloatArray
from paceline.draft.scored import Scored
from paceline.engine.draft_tree import Origin
from paceline.errors import ConfigError

_BUCKETS = 10
MOST = 256
"""No draft has more nodes (`plan.spec.MAX_LENGTH`), so no shape needs a larger number."""


@dataclass(frozen=True, slots=True)
class Child:
    """A node to add below `parent` (-1: the root). `expand`: score it, and ask the shape for its children."""

    parent: int
    token: int
    key: int
    expand: bool


class Growth(Protocol):
    """One tree in the making."""

    def grow(self, scored: Sequence[Scored], next_node: int) -> Sequence[Child]:
        """Children to add now that more nodes are scored (at first: the root).

        Args:
            scored: the nodes whose laws have just become known, in the order in which they were added.
            next_node: number that the first child returned will have.
        """
        ...

    def finish(self, next_node: int) -> Sequence[Child]:
        """Children to add without scoring anything more, when drafting ends."""
        ...


class TreeShape(Protocol):
    """A way to grow trees."""

    name: str
    origin: Origin
    """What the tokens are under rules other than `coupled`."""
    prior: FloatArray
    """First guess of acceptance by confidence class.  # [num_keys]"""
    width: float
    """Nodes of a level, on average."""
    by_rank: bool
    """Whether a node's class is its rank among its siblings, and the best tree for these classes is grown."""

    def start(self, budget: int, depth: int, acceptance: FloatArray | None) -> Growth:
        """An empty tree.

        Args:
            budget: most nodes.
            depth: most levels.
            acceptance: estimates by confidence class, if there are any.  # [num_keys]
        """
        ...


def check_counts(what: str, counts: Sequence[int], example: str) -> None:
    """Refuse a number that no tree can have.

    Raises:
        ConfigError: one is below 1 or above `MOST`.
    """
    for count in counts:
        if not 1 <= count <= MOST:
            shown = str(count) if abs(count) < 10**9 else "a huge number"
            raise ConfigError(f"{what} is {shown}, not from 1 to {MOST}.", field="tree", fix=f"Write {example}.")


PRIOR: FloatArray = np.concatenate([np.linspace(0.2, 0.95, _BUCKETS), np.linspace(0.02, 0.5, _BUCKETS)])
"""Of the classes that `confidence_key` gives."""


def confidence_key(chance: float, rank: int) -> int:
    """Class of a child: the chance its draft law sees for it in tenths, told apart for first and later siblings."""
    return min(int(chance * _BUCKETS), _BUCKETS - 1) + (_BUCKETS if rank else 0)


def children_of(scored: Scored, count: int, *, expand: bool, distinct: bool = True) -> list[Child]:
    """The first `count` tokens that the node's law draws (or likes best), with their classes.

    Args:
        scored: the parent.
        count: how many; fewer if the law has no more.
        expand: whether they will have children.
        distinct: without replacement.
    """
    tokens = scored.ranked(count).tokens if distinct else scored.independent(count)
    chances = scored.chances(tokens)
    return [
        Child(scored.node, token, confidence_key(chance, rank), expand)
        for rank, (token, chance) in enumerate(zip(tokens, chances, strict=True))
    ]
