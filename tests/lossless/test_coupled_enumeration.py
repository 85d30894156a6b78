"""E1 for `coupled`: over all target draws and all small trees, the committed tokens are the target's own draws.

Since the trees are enumerated beside the draws, this covers drafters that share the target's noise, and even ones that
knew its draws: whatever the tree, pruning or re-ranking, the text does not change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from paceline.bench.laws import make_tree
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law
from paceline.engine.types import Walk
from paceline.verify.base import ROOT, AcceptanceRule
from paceline.verify.coupled import CoupledRule

VOCAB = 3


def all_trees(most_nodes: int) -> Iterator[DraftTree]:
    """Every tree with distinct siblings, in every numbering that puts parents first."""
    for n in range(most_nodes + 1):
        for parents in itertools.product(*(range(-1, i) for i in range(n))):
            for tokens in itertools.product(range(VOCAB), repeat=n):
                if len(set(zip(parents, tokens, strict=True))) == n:
                    yield make_tree(tokens, parents)


class DrawsThis(Law):
    """A law whose draw is prescribed by the enumeration; its probabilities play no part."""

    def draw(self, words: Any) -> int:
        return int(words)


class Prescribed:
    """Noise that prescribes the target's draw at every position."""

    def __init__(self, draws: Sequence[int]) -> None:
        self.draws = draws

    def words(self, position: int, stream: Stream, count: int) -> int:
        assert stream is Stream.TARGET
        assert count == VOCAB
        return self.draws[position]


def check_walks(rule: AcceptanceRule, most_nodes: int = 4) -> int:
    """For all trees and all target draws: what is committed are the draws, cut at the first that the tree lacks."""
    law = DrawsThis(np.log(np.array([0.2, 0.5, 0.3])))
    checked = 0
    for tree in all_trees(most_nodes):
        deepest = int(tree.depths().max(initial=0))
        for draws in itertools.product(range(VOCAB), repeat=deepest + 1):
            asked: list[tuple[int, tuple[int, ...]]] = []

            def law_of(node: int, path: Sequence[int], asked: list[Any] = asked) -> Law:
                asked.append((node, tuple(path)))
                return law

            walk = rule.accept(tree, law_of, Prescribed(draws), 0, VOCAB)  # type: ignore[arg-type]
            expected = reference_walk(tree, draws)
            assert walk == expected, (tree.tokens, tree.parents, draws)
            nodes = [ROOT, *walk.path]
            assert asked == [(node, draws[:i]) for i, node in enumerate(nodes)], "a law was asked with a wrong history"
            checked += 1
    return checked


def reference_walk(tree: DraftTree, draws: Sequence[int]) -> Walk:
    """Matches whole root paths instead of walking."""
    paths: list[tuple[int, ...]] = [()]  # node ids from the root down
    for node, parent in enumerate(tree.parents.tolist()):
        paths.append((*paths[parent + 1], node))
    matching = [path for path in paths if [int(tree.tokens[i]) for i in path] == list(draws[: len(path)])]
    longest = max(matching, key=len)
    return Walk(longest, tuple(draws[: len(longest) + 1]))


def test_coupled_commits_the_targets_draws_whatever_the_tree() -> None:
    assert check_walks(CoupledRule()) > 50_000


class _BestChild(CoupledRule):
    """Broken: descends into the likeliest child instead of the drawn one."""

    def accept(self, tree: DraftTree, law: Any, noise: Any, position: int, vocab_size: int) -> Walk:
        path: list[int] = []
        tokens: list[int] = []
        node = ROOT
        while children := tree.children()[node + 1]:
            p = law(node, tokens).probabilities(vocab_size)
            node = max(children, key=lambda child: p[tree.tokens[child]])
            path.append(node)
            tokens.append(int(tree.tokens[node]))
        return Walk(tuple(path), (*tokens, noise.words(position + len(tokens), Stream.TARGET, vocab_size)))


class _FirstChildOnly(CoupledRule):
    """Broken: looks at the first sibling only, so it ends too early (and `commit` would lose the path)."""

    def accept(self, tree: DraftTree, *rest: Any) -> Walk:
        first = [kids[0] for kids in tree.children() if kids]
        reachable = [i for i in first if tree.parents[i] in (ROOT, *first)]
        return super().accept(tree.keep(np.array(sorted(reachable), dtype=np.int64)), *rest)


class _OffByOne(CoupledRule):
    """Broken: reads the noise of the next position."""

    def accept(self, tree: DraftTree, law: Any, noise: Any, position: int, vocab_size: int) -> Walk:
        shifted = Prescribed([*noise.draws[1:], 0])
        return super().accept(tree, law, shifted, position, vocab_size)  # type: ignore[arg-type]


class _StaleHistory(CoupledRule):
    """Broken: every law is asked with the root's history."""

    def accept(self, tree: DraftTree, law: Any, *rest: Any) -> Walk:
        return super().accept(tree, lambda node, _path: law(node, ()), *rest)


@pytest.mark.parametrize("broken", [_BestChild, _FirstChildOnly, _OffByOne, _StaleHistory])
def test_broken_coupled_rules_are_caught(broken: type[CoupledRule]) -> None:
    with pytest.raises(AssertionError):
        check_walks(broken(), most_nodes=2)


def _random_tree(rng: np.random.Generator, vocab: int, nodes: int) -> DraftTree:
    taken: set[tuple[int, int]] = set()
    parents: list[int] = []
    tokens: list[int] = []
    for i in range(nodes):
        place = (int(rng.integers(-1, i)) if i else -1, int(rng.integers(vocab)))
        if place not in taken:
            taken.add(place)
            parents.append(min(place[0], len(parents) - 1))
            tokens.append(place[1])
    return make_tree(tokens, parents)


@pytest.mark.parametrize("options", [{}, {"ids": [0, 2, 3]}], ids=["dense", "cut"])
def test_coupled_with_real_noise_gives_one_text_for_all_trees_and_prunings(options: dict[str, Any]) -> None:
    """Round after round over random trees, pruned at random: always the text of plain decoding."""
    ids = np.array(options["ids"]) if options else None

    def law_after(context: Sequence[int]) -> Law:
        row = np.random.default_rng([3, *context]).normal(0, 1, 4).astype(np.float32)
        return Law(row) if ids is None else Law(row[ids], ids)

    rng = np.random.default_rng(4)
    accepted = 0
    for seed in range(40):
        noise = Noise(seed, seed % 3)
        plain: list[int] = []
        while len(plain) < 12:
            plain.extend(_accept(EMPTY_TREE, law_after, noise, plain).tokens)
        looked_ahead: list[int] = []
        while len(looked_ahead) < 12:
            tree = _random_tree(rng, 4, 12)
            kept = [i for i in range(len(tree)) if rng.random() < 0.8]
            kept = [i for i in kept if _ancestors(tree, i) <= set(kept)]
            walk = _accept(tree.keep(np.array(kept, dtype=np.int64)), law_after, noise, looked_ahead)
            looked_ahead.extend(walk.tokens)
            accepted += len(walk.path)
        assert looked_ahead[:12] == plain[:12]
    assert accepted > 50


def _accept(tree: DraftTree, law_after: Any, noise: Noise, context: Sequence[int]) -> Walk:
    return CoupledRule().accept(tree, lambda _n, path: law_after((*context, *path)), noise, len(context), 4)


def _ancestors(tree: DraftTree, node: int) -> set[int]:
    return set(np.flatnonzero(tree.ancestor_mask()[node]).tolist())
