"""Draft trees: the union of several proposals, survival along paths, and subtrees."""

from __future__ import annotations

import numpy as np
import pytest
from engine_tools import tree

from paceline.draft.base import NOTHING, Proposal, chain
from paceline.draft.tree import build, merge
from paceline.engine.draft_tree import DraftTree
from paceline.engine.feedback import node_labels
from paceline.engine.sampling import Law

ACCEPTANCE = {"a": np.array([0.9, 0.6, 0.3]), "b": np.array([0.8, 0.5, 0.95])}


def random_proposal(rng: np.random.Generator, size: int) -> Proposal:
    """A tree without two equal siblings."""
    tokens: list[int] = []
    parents: list[int] = []
    for i in range(size):
        parent = int(rng.integers(-1, i))
        free = set(range(3)) - {t for t, p in zip(tokens, parents, strict=True) if p == parent}
        if free:
            tokens.append(int(rng.choice(sorted(free))))
            parents.append(parent if parent < len(tokens) else -1)
        else:
            break
    return Proposal(np.array(tokens), np.array(parents), rng.integers(0, 3, len(tokens)))


def paths(tokens: np.ndarray, parents: np.ndarray) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def check_survival(made: DraftTree) -> None:
    for parent in range(-1, len(made)):
        above = 1.0 if parent < 0 else made.survival[parent]
        below = made.survival[made.parents == parent]
        assert (below <= above).all(), "survival never grows along a path"
        assert below.sum() <= above + 1e-12, "siblings exclude one another"
    assert (made.survival >= 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_merged_tree_is_the_union_of_paths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    proposals = [("a", random_proposal(rng, 14)), ("b", random_proposal(rng, 14))]
    made = merge(proposals, ACCEPTANCE)
    found = paths(made.tokens, made.parents)
    assert len(set(found)) == len(found)
    by_drafter = {name: dict(zip(paths(p.tokens, p.parents), p.key.tolist(), strict=True)) for name, p in proposals}
    assert set(found) == set(by_drafter["a"]) | set(by_drafter["b"])
    for path, owner, key in zip(found, made.drafter, made.key.tolist(), strict=True):
        claims = {name: ACCEPTANCE[name][keys[path]] for name, keys in by_drafter.items() if path in keys}
        assert claims[owner] == max(claims.values()), "a node belongs to whoever expects most of it"
        assert key == by_drafter[owner][path]
    check_survival(made)
    assert seed != 0 or len(found) < sum(len(p) for _, p in proposals), "this one shares nodes"


def test_merging_chains_by_hand() -> None:
    made = merge([("a", chain([1, 2, 3], [0, 1, 2])), ("b", chain([1, 2, 4], [0, 2, 0]))], ACCEPTANCE)
    assert made.tokens.tolist() == [1, 2, 3, 4]
    assert made.parents.tolist() == [-1, 0, 1, 1]
    assert made.drafter == ("a", "b", "a", "b")
    # Below node 1 the estimates 0.3 and 0.8 sum to 1.1 and are scaled down.
    assert made.survival == pytest.approx([0.9, 0.9 * 0.95, 0.855 * 0.3 / 1.1, 0.855 * 0.8 / 1.1])


def test_one_or_no_proposal_is_taken_as_it_is() -> None:
    assert len(merge([], ACCEPTANCE)) == len(merge([("a", NOTHING), ("b", NOTHING)], ACCEPTANCE)) == 0
    single = chain([5, 6], [0, 1])
    made = merge([("a", NOTHING), ("b", single)], ACCEPTANCE)
    assert made.drafter == ("b", "b")
    assert made.survival == pytest.approx([0.8, 0.4])


@pytest.mark.parametrize("seed", range(5))
def test_survival_of_one_proposal(seed: int) -> None:
    made = build("a", random_proposal(np.random.default_rng(seed), 20), ACCEPTANCE["a"])
    check_survival(made)
    straight = build("b", chain([1, 2, 3], [2, 1, 0]), ACCEPTANCE["b"])
    assert straight.survival == pytest.approx([0.95, 0.95 * 0.5, 0.95 * 0.5 * 0.8])
    assert not straight.sampled


def test_sampled_chains_carry_their_laws() -> None:
    laws = tuple(Law.point(t) for t in (4, 5, 6))
    made = build("a", chain([4, 5, 6], [0, 0, 0], laws), ACCEPTANCE["a"])
    assert made.sampled
    cut = made.keep(np.arange(2))
    assert cut.sampled
    assert cut.laws == laws[:2]


@pytest.mark.parametrize("seed", range(10))
def test_keep_is_the_subtree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(-1, i)) for i in range(15)]
    names = tuple("ab"[i % 2] for i in range(15))
    whole = tree(rng.permutation(15).tolist(), parents, key=np.arange(15), drafter=names)
    mask = whole.ancestor_mask()
    kept = np.flatnonzero(mask[rng.permutation(15)[:4]].any(axis=0))  # four nodes and their ancestors
    cut = whole.keep(kept)
    found = dict(zip(paths(whole.tokens, whole.parents), range(15), strict=True))
    assert [found[path] for path in paths(cut.tokens, cut.parents)] == kept.tolist()
    assert cut.key.tolist() == kept.tolist()
    assert cut.drafter == tuple(names[i] for i in kept)
    assert cut.survival.tolist() == whole.survival[kept].tolist()
    assert whole.keep(np.arange(15)) is whole
    assert len(whole.keep(np.arange(0))) == 0


def test_shapes_of_a_tree() -> None:
    made = tree([1, 2, 3, 4], [-1, -1, 0, 2])
    assert made.depths().tolist() == [1, 1, 2, 3]
    assert made.children() == [[0, 1], [2], [], [3], []]
    assert made.ancestor_mask().astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert not made.is_chain()
    assert tree([1, 2], [-1, 0]).is_chain()


def test_every_proposer_of_a_shared_node_is_labelled() -> None:
    """A node belongs to one drafter, but the others that proposed it learn from it too."""
    merged = merge(
        [("a", chain([5, 6], [0, 0])), ("b", chain([5, 7], [1, 1]))], {"a": np.array([0.9]), "b": np.full(2, 0.2)}
    )
    found = node_labels([(0, merged, [5, 7, 1])], {"a": np.full((1, 2), 0.9), "b": np.full((1, 2), 0.2)})
    rows = [found.names[d] for d in found.drafter], found.key.tolist(), found.accepted.tolist()
    assert sorted(zip(*rows, strict=True)) == [("a", 0, False), ("a", 0, True), ("b", 1, True), ("b", 1, True)]
    assert sorted(zip(rows[0], found.depth.tolist(), strict=True)) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_what_hangs_from_a_node_is_a_tree_of_its_own() -> None:
    whole = tree(
        [5, 6, 7, 8, 9, 10], [-1, -1, 0, 1, 2, 3], key=np.arange(6), shared=((2, "suffix", 4), (3, "suffix", 1))
    )
    below = whole.below(0)
    assert (below.tokens.tolist(), below.parents.tolist()) == ([7, 9], [-1, 0])
    assert below.key.tolist() == [2, 4]
    assert below.survival.tolist() == whole.survival[[2, 4]].tolist()
    assert below.shared == ((0, "suffix", 4),)
    assert whole.below(1).tokens.tolist() == [8, 10]
    assert len(whole.below(5)) == 0
