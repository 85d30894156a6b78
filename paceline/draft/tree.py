"""Building draft trees: survival of a proposal's nodes, and the union of several proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.draft.base import Proposal
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree


def build(name: str, proposal: Proposal, acceptance: FloatArray) -> DraftTree:
    """A tree from one proposal; survival is the product of acceptance estimates along the path.

    Args:
        name: the drafter.
        proposal: its nodes.
        acceptance: estimated acceptance probability by confidence class.  # [num_keys]
    """
    n = len(proposal)
    if n == 0:
        return EMPTY_TREE
    survival: FloatArray = acceptance[proposal.key]
    if _is_chain(proposal):
        survival = np.asarray(np.cumprod(survival), dtype=np.float64)
    else:
        survival = _down_the_tree(proposal.parents.tolist(), survival.tolist())
    return DraftTree(
        tokens=proposal.tokens,
        parents=proposal.parents,
        drafter=(name,) * n,
        key=proposal.key,
        survival=survival,
        origin=proposal.origin,
        laws=proposal.laws,
    )


def merge(proposals: Sequence[tuple[str, Proposal]], acceptance: Mapping[str, FloatArray]) -> DraftTree:
    """The union of several proposals of chosen tokens as one tree.

    Paths that agree share nodes; a node belongs to the drafter that expects most of it. Siblings exclude one
    another, so where their estimates sum to more than one they are scaled down.
    """
    filled = [(name, p) for name, p in proposals if len(p)]
    if len(filled) <= 1:
        return build(*filled[0], acceptance[filled[0][0]]) if filled else EMPTY_TREE
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    tokens: list[int] = []
    parents: list[int] = []
    owner: list[str] = []
    keys: list[int] = []
    expect: list[float] = []
    shared: list[tuple[int, str, int]] = []
    for name, proposal in filled:
        table = acceptance[name]
        place = [-1] * (len(proposal) + 1)  # last entry: the root
        rows = zip(proposal.tokens.tolist(), proposal.parents.tolist(), proposal.key.tolist(), strict=True)
        for i, (token, parent, key) in enumerate(rows):
            at = (place[parent], token)
            node = nodes.setdefault(at, len(tokens))
            place[i] = node
            chance = float(table[key])
            if node == len(tokens):
                tokens.append(token)
                parents.append(at[0])
                owner.append(name)
                keys.append(key)
                expect.append(chance)
            elif chance > expect[node]:
                shared.append((node, owner[node], keys[node]))
                owner[node], keys[node], expect[node] = name, key, chance
            else:
                shared.append((node, name, key))
    return DraftTree(
        tokens=np.array(tokens, dtype=np.int64),
        parents=np.array(parents, dtype=np.int64),
        drafter=tuple(owner),
        key=np.array(keys, dtype=np.int64),
        survival=_down_the_tree(parents, expect),
        shared=tuple(shared),
    )


def part(proposal: Proposal, nodes: IntArray) -> Proposal:
    """What `nodes` (ascending, ancestors included) are of a proposal whose tokens were chosen."""
    assert proposal.laws is None, "a sampled draft is kept whole"
    if len(nodes) == len(proposal):
        return proposal
    new_id = np.full(len(proposal) + 1, -1, dtype=np.int64)  # last entry: the root maps to itself
    new_id[nodes] = np.arange(len(nodes))
    return Proposal(proposal.tokens[nodes], new_id[proposal.parents[nodes]], proposal.key[nodes])


def _is_chain(proposal: Proposal) -> bool:
    return bool(proposal.parents[-1] == len(proposal) - 2) and bool(
        np.array_equal(proposal.parents, np.arange(-1, len(proposal) - 1))
    )


def _down_the_tree(parents: Sequence[int], expect: Sequence[float]) -> FloatArray:
    """Survival from the conditional estimates; siblings' estimates are scaled to sum to one at most."""
    total = [0.0] * (len(parents) + 1)  # last entry: children of the root
    for parent, chance in zip(parents, expect, strict=True):
        total[parent] += chance
    survival = [1.0] * (len(parents) + 1)
    for i, (parent, chance) in enumerate(zip(parents, expect, strict=True)):
        survival[i] = survival[parent] * chance / max(1.0, total[parent])
    return np.array(survival[:-1])
