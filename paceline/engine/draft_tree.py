"""The flat draft tree. Its conventions (root, parents, siblings) stand in `engine.types`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.engine.sampling import Law


class Origin(Enum):
    """How the tokens of a draft came about; rules other than `coupled` rely on that claim."""

    CHOSEN = "chosen"
    """Without looking at any draw: likeliest tokens, tokens seen before."""
    INDEPENDENT = "independent"
    """Drawn from the draft law of their parent's position; siblings independently, so that they may repeat."""
    DISTINCT = "distinct"
    """Drawn from it without replacement, siblings standing in the order of their draws."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """One request's draft: a flat token tree (a chain is `parents = [-1, 0, 1, ...]`).

    `drafter[i]` names who guessed node i and `key[i]` its confidence class there. What `origin` calls drawn came from
    `laws`, one draft law per node: the law at its parent's position, before any sibling was drawn.
    """

    tokens: IntArray  # [n]
    parents: IntArray  # [n], -1 is the root
    drafter: tuple[str, ...]  # [n]
    key: IntArray  # [n]
    survival: FloatArray  # [n], estimated probability that the node and all its ancestors are accepted
    origin: Origin = Origin.CHOSEN
    laws: tuple[Law, ...] | None = None  # [n] unless chosen
    shared: tuple[tuple[int, str, int], ...] = ()
    """(node, drafter, key) of further drafters that proposed the same node; they are labelled like the owner."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampled(self) -> bool:
        """Whether tokens were drawn, so that which of them are verified must not depend on what was drawn after."""
        return self.origin is not Origin.CHOSEN

    def is_chain(self) -> bool:
        """Whether every node is the only child of the one before it."""
        return bool(np.array_equal(self.parents, np.arange(-1, len(self) - 1)))

    def depths(self) -> IntArray:
        """Depth of each node; children of the root have depth 1.  # [n]"""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return np.array(depths, dtype=np.int64)

    def ancestor_mask(self) -> BoolArray:
        """`mask[i, j]`: node j is node i or one of its ancestors.  # [n, n]"""
        n = len(self)
        mask = np.zeros((n, n), dtype=np.bool_)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                mask[i] = mask[parent]
            mask[i, i] = True
        return mask

    def children(self) -> list[list[int]]:
        """Node ids by parent, sibling order kept; entry 0 is the root's, entry i + 1 node i's."""
        kids: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for i, parent in enumerate(self.parents):
            kids[int(parent) + 1].append(i)
        return kids

    def keep(self, nodes: IntArray) -> DraftTree:
        """The subtree of `nodes` (ascending, ancestors included)."""
        n = len(nodes)
        if n == len(self):
            return self
        if not n:
            return EMPTY_TREE
        if nodes[-1] == n - 1:
            return self._first(n)
        new_id = np.full(len(self) + 1, -1, dtype=np.int64)  # last entry: the root maps to itself
        new_id[nodes] = np.arange(len(nodes))
        return self._picked(nodes, new_id)

    def _picked(self, nodes: IntArray, new_id: IntArray) -> DraftTree:
        """Some nodes; `new_id` says what becomes of each, -1 of a parent that is the root now."""
        picked = nodes.tolist()
        return DraftTree(
            tokens=self.tokens[nodes],
            parents=new_id[self.parents[nodes]],
            drafter=tuple(self.drafter[i] for i in picked),
            key=self.key[nodes],
            survival=self.survival[nodes],
            origin=self.origin,
            laws=None if self.laws is None else tuple(self.laws[i] for i in picked),
            shared=tuple((int(new_id[node]), name, key) for node, name, key in self.shared if new_id[node] >= 0),
        )

    def below(self, node: int) -> DraftTree:
        """What hangs from a node, as a tree of which it is the root."""
        inside = {node}
        for i, parent in enumerate(self.parents.tolist()):
            if parent in inside:
                inside.add(i)
        picked = np.array(sorted(inside - {node}), dtype=np.int64)
        if not len(picked):
            return EMPTY_TREE
        new_id = np.full(len(self) + 1, -1, dtype=np.int64)
        new_id[picked] = np.arange(len(picked))
        return self._picked(picked, new_id)

    def _first(self, n: int) -> DraftTree:
        """The first n nodes."""
        return DraftTree(
            self.tokens[:n],
            self.parents[:n],
            self.drafter[:n],
            self.key[:n],
            self.survival[:n],
            self.origin,
            None if self.laws is None else self.laws[:n],
            tuple(entry for entry in self.shared if entry[0] < n) if self.shared else (),
        )


EMPTY_TREE = DraftTree(
    tokens=np.empty(0, dtype=np.int64),
    parents=np.empty(0, dtype=np.int64),
    drafter=(),
    key=np.empty(0, dtype=np.int64),
    survival=np.empty(0, dtype=np.float64),
)
