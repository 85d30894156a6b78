"""Trees from a positional acceptance vector: Sequoia's dynamic programme (2402.12374, section 4.1).

`acceptance[b]` is the probability that the b-th child of a node is the one accepted, given that the node was. If that
is all one knows, the node reached by the ranks b1, b2, ... is accepted with probability a[b1] * a[b2] * ..., and the
best tree of n nodes and d levels splits into the best subtrees of its root's children:

    gain(n, d) = max over the number of children and their shares of the n nodes
                 of the sum over b of a[b] * (1 + gain(share_b - 1, d - 1))

Children are filled in rank order, one (max, +) convolution for each; nothing here asks that the vector falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from paceline.arrays import FloatArray, IntArray

RANKS = 16
"""Children of a node that are told apart; later ones are never drafted."""
_STEPS_PER_E = 8.0
"""Vectors are rounded to so many steps per factor e before their table is looked up: 6% at most, which hardly moves
the value of the best tree (to first order it does not depend on the tree)."""
_LEAST = 1e-3
_KEPT = 256


@dataclass(frozen=True, slots=True)
class TreeNode:
    """One node of a tree without tokens."""

    parent: int
    """-1: the root."""
    rank: int
    """Which child of its parent."""


@dataclass(frozen=True, eq=False)
class TreeTable:
    """The best trees of all sizes and depths for one vector.

    `gain[d, n]` is the expected number of accepted nodes of the best tree with at most n nodes and d levels; one more
    token follows them.
    """

    gain: FloatArray  # [levels + 1, nodes + 1]
    _children: IntArray  # [levels + 1, nodes + 1], of the root
    _share: NDArray[np.int16]  # [levels + 1, ranks, nodes + 1], nodes that the child of that rank gets with its subtree

    def level(self, depth: int) -> int:
        """The row of `gain` for a depth; beyond the last row nothing changes."""
        return min(depth, len(self.gain) - 1)

    def tree(self, nodes: int, depth: int) -> list[TreeNode]:
        """The best tree: level by level, parents before children, siblings in rank order."""
        made: list[TreeNode] = []
        level = [(-1, nodes, self.level(depth))]
        while level:
            below = []
            for parent, size, depth_left in level:
                for rank, share in enumerate(self._shares(size, depth_left)):
                    below.append((len(made), share - 1, depth_left - 1))
                    made.append(TreeNode(parent, rank))
            level = below
        return made

    def _shares(self, size: int, depth: int) -> list[int]:
        """Nodes of each child's subtree, itself included."""
        if size < 1 or depth < 1:
            return []
        shares = []
        for rank in range(int(self._children[depth, size]) - 1, -1, -1):
            shares.append(int(self._share[depth, rank, size]))
            size -= shares[-1]
        return shares[::-1]


def best_trees(acceptance: FloatArray, nodes: int, depth: int) -> TreeTable:
    """The dynamic programme.

    Args:
        acceptance: by rank.  # [ranks]
        nodes: the largest tree.
        depth: most levels; fewer are computed where more do not help.
    """
    ranks = min(len(acceptance), nodes)
    gain = [np.zeros(nodes + 1)]
    children = [np.zeros(nodes + 1, dtype=np.int64)]
    shares = [np.zeros((ranks, nodes + 1), dtype=np.int16)]
    for _ in range(min(depth, nodes)):
        found = _next_level(acceptance[:ranks], gain[-1])
        if np.array_equal(found[0], gain[-1]):
            break
        gain.append(found[0])
        children.append(found[1])
        shares.append(found[2])
    return TreeTable(np.stack(gain), np.stack(children), np.stack(shares))


def _next_level(acceptance: FloatArray, below: FloatArray) -> tuple[FloatArray, IntArray, NDArray[np.int16]]:
    """Trees one level deeper: their gain, their root's children, and the nodes of each child's subtree.

    Args:
        acceptance: by rank.  # [ranks]
        below: gain of the subtrees by size.  # [nodes + 1]
    """
    nodes = len(below) - 1
    exactly = np.zeros(nodes + 1)  # gain with exactly so many children
    best, children = exactly, np.zeros(nodes + 1, dtype=np.int64)
    shares = np.zeros((len(acceptance), nodes + 1), dtype=np.int16)
    for rank, chance in enumerate(acceptance.tolist()):
        # Row n, column s: the first ranks with n - 1 - s nodes, and s nodes below this child.
        padded = np.concatenate([np.full(nodes, -np.inf), exactly[:nodes]])
        rest = sliding_window_view(padded, nodes)[1 : nodes + 1, ::-1]
        value = rest + chance * (1.0 + below[:nodes])
        share = value.argmax(axis=1)
        exactly = np.concatenate([[-np.inf], value[np.arange(nodes), share]])
        shares[rank, 1:] = share + 1
        better = exactly > best
        best, children = np.where(better, exactly, best), np.where(better, rank + 1, children)
    return best, children, shares


def positional(estimates: FloatArray) -> FloatArray:
    """An acceptance vector from measured estimates by rank.

    What was never tried, or by few, has an estimate that is mostly its prior. Two facts keep it honest: a later
    sibling is not accepted more often than an earlier one, and siblings exclude one another, so that what is left for
    a rank is what the ranks before it have not taken.

    Args:
        estimates: probability by rank that this sibling is the accepted one.  # [ranks]
    """
    left, least, found = 1.0, 1.0, []
    for estimate in estimates.tolist():
        least = min(estimate, least, max(left, 0.0))
        left -= least
        found.append(least)
    return np.array(found)


def tree_table(acceptance: FloatArray, nodes: int, depth: int) -> TreeTable:
    """The table of a vector rounded a little, kept for the next request and step that ask for about the same.

    Args:
        acceptance: by rank.  # [ranks]
        nodes: trees up to this size are wanted.
        depth: most levels.
    """
    steps = np.rint(np.log(np.maximum(acceptance, _LEAST)) * _STEPS_PER_E).astype(np.int64)
    size = 1 << max(nodes - 1, 1).bit_length()
    return _kept_table(tuple(steps.tolist()), size, min(1 << max(depth - 1, 1).bit_length(), size))


@lru_cache(maxsize=_KEPT)
def _kept_table(steps: Sequence[int], nodes: int, depth: int) -> TreeTable:
    return best_trees(np.exp(np.array(steps) / _STEPS_PER_E), nodes, depth)


def expected_accepted(tree: Sequence[TreeNode], acceptance: FloatArray) -> float:
    """Expected number of accepted nodes of a tree under a positional vector.

    Args:
        tree: parents before children.
        acceptance: by rank.  # [ranks]
    """
    survival: list[float] = []
    for node in tree:
        above = survival[node.parent] if node.parent >= 0 else 1.0
        survival.append(above * float(acceptance[node.rank]))
    return sum(survival)
