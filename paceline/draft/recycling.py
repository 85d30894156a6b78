"""Token Recycling (2408.08696): a static tree over a matrix of each token's last seen likeliest successors.

`matrix[t]` holds the 8 likeliest tokens that the target gave the last time t was its input, whether or not that node
was accepted. It is kept across requests (per tenant salt) and refreshed from every verified node. A node of the static
tree is a path of ranks: its token is the rank-th entry of its parent token's row. The published template has 80 nodes
in levels of 8, 21, 25, 15, 8 and 3, skewed so that low ranks go deep.

Rows never seen propose nothing (the release proposes token 0 there). Confidence class: rank and depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from paceline.arrays import IntArray
from paceline.draft.base import NOTHING, DraftContext, Proposal
from paceline.draft.tenants import Tenants
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap

WIDTH = 8
LEVEL_SIZES = (8, 21, 25, 15, 8, 3)
_RANK_WEIGHTS = np.array([0.45, 0.15, 0.09, 0.065, 0.05, 0.04, 0.035, 0.03])
_DEPTH_CLASSES = 3
_MAX_TENANTS = 64
"""Matrices kept at most (1.5 MB each for 49,152 tokens)."""
_MAX_CHAIN = 16


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A static tree: node i is entry `ranks[i]` of its parent's row. Nodes stand level by level."""

    parents: IntArray  # [n]
    ranks: IntArray  # [n]
    key: IntArray  # [n]
    levels: tuple[slice, ...]


@lru_cache(maxsize=128)
def static_template(num_nodes: int) -> Template:
    """The best `num_nodes` of the 80-node template: highest product of rank weights, ancestors included."""
    paths: list[tuple[float, tuple[int, ...]]] = []
    level: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for size in LEVEL_SIZES:
        children = [(score * w, (*path, r)) for score, path in level for r, w in enumerate(_RANK_WEIGHTS.tolist())]
        level = sorted(children, key=lambda c: (-c[0], c[1]))[:size]
        paths += level
    best = sorted(paths, key=lambda c: (-c[0], len(c[1]), c[1]))[:num_nodes]
    return _template([path for _, path in best])


@lru_cache(maxsize=128)
def chain_template(num_nodes: int) -> Template:
    """Always the likeliest successor."""
    return _template([(0,) * depth for depth in range(1, min(num_nodes, _MAX_CHAIN) + 1)])


def _template(paths: list[tuple[int, ...]]) -> Template:
    paths = sorted(paths, key=lambda p: (len(p), p))
    place = {path: i for i, path in enumerate(paths)}
    depths = np.array([len(p) for p in paths], dtype=np.int64)
    ranks = np.array([p[-1] for p in paths], dtype=np.int64)
    bounds = np.searchsorted(depths, np.arange(1, int(depths.max()) + 2))
    return Template(
        parents=np.array([place.get(p[:-1], -1) for p in paths], dtype=np.int64),
        ranks=ranks,
        key=ranks + WIDTH * np.minimum(depths - 1, _DEPTH_CLASSES - 1),
        levels=tuple(slice(a, b) for a, b in pairwise(bounds.tolist())),
    )


class RecyclingDrafter:
    """Token Recycling.

    Args:
        vocab_size: rows of the matrix.
        chain: draft only the likeliest path (for rules that need a chain).
    """

    name = "recycling"
    taps = frozenset({Tap.TOP_IDS})
    cost_per_token = False
    blocks = None

    def __init__(self, *, vocab_size: int, chain: bool = False) -> None:
        self._vocab_size = vocab_size
        self._template = chain_template if chain else static_template
        self._matrices = Tenants(self._empty, _MAX_TENANTS)
        by_depth = [np.minimum(_RANK_WEIGHTS * (1 + 0.2 * d), 0.9) for d in range(_DEPTH_CLASSES)]
        self.prior = np.concatenate(by_depth)

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """The template filled from the matrix, without the nodes whose tokens are unknown."""
        return [self._propose(c) if c.budget > 0 else NOTHING for c in contexts]

    def _propose(self, context: DraftContext) -> Proposal:
        matrix = self._matrices.of(context.request)
        root = context.request.token_ids[-1]
        if matrix[root, 0] < 0:
            return NOTHING
        template = self._template(context.budget)
        tokens = np.full(len(template.ranks) + 1, root, dtype=np.int64)  # last entry: the root
        for level in template.levels:
            parent = tokens[template.parents[level]]
            tokens[level] = np.where(parent < 0, -1, matrix[parent, template.ranks[level]])
        known = np.flatnonzero(tokens[:-1] >= 0)
        if len(known) == len(template.ranks):
            return Proposal(tokens[:-1], template.parents, template.key)
        new_id = np.full(len(tokens), -1, dtype=np.int64)
        new_id[known] = np.arange(len(known))
        return Proposal(tokens[known], new_id[template.parents[known]], template.key[known])

    def observe(self, observation: Observation) -> None:
        """Refresh the rows of every verified node, rejected ones too; of duplicates the last wins."""
        if observation.top_ids is not None:
            self._matrices.of(observation.request)[observation.row_tokens] = observation.top_ids

    def forget(self, request: Request) -> None:
        """The request no longer protects its tenant's matrix."""
        self._matrices.forget(request)

    def _empty(self) -> NDArray[np.int32]:
        return np.full((self._vocab_size, WIDTH), -1, dtype=np.int32)
