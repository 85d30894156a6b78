"""Tree shapes over made-up rows: budgets and depths, the order of siblings, laws that run out, grammars, best sets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from shape_tools import paths_of, propose, random_rows, request_of, siblings_of, tree_drafter

from paceline.draft.base import Proposal
from paceline.draft.shapes.cape import CapeShape
from paceline.draft.shapes.registry import SHAPES, create_shape, parse_tree
from paceline.draft.shapes.sequoia import PRIOR
from paceline.draft.shapes.stochastic_beam import conditioned
from paceline.draft.tree import build
from paceline.engine.draft_tree import Origin
from paceline.engine.positional import positional, tree_table
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import build_law
from paceline.errors import ConfigError
from paceline.verify.base import AcceptanceRule
from paceline.verify.multi import MultiRule
from paceline.verify.recursive import RecursiveRule

VOCAB = 12
TREES = (
    "chain",
    "branching:widths=3/2/1",
    "k-ary:k=3",
    "best-first:expand=2,width=4",
    "rsd-c:widths=2/3",
    "rsd-s:width=3",
    "sequoia",
    "cape",
)
ORIGINS = {"coupled": None, "recursive": Origin.DISTINCT, "multi": Origin.INDEPENDENT}
CASES = [case for case in itertools.product(TREES, ORIGINS) if not case[0].startswith("rsd") or case[1] != "multi"]
CHOSEN = ("best-first:expand=2,width=4", "cape")


def test_every_shape_is_tested() -> None:
    assert {tree.partition(":")[0] for tree in TREES} == set(SHAPES)


@pytest.mark.parametrize(("tree", "rule"), CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_every_tree_keeps(tree: str, rule: str, temperature: float) -> None:
    """Budget and depth, parents before children, no sibling twice unless drawn so, classes that have a prior."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        budget, depth = int(rng.integers(1, 24)), int(rng.integers(1, 6))
        made = tree_drafter(tree, ORIGINS[rule], random_rows(seed, VOCAB), VOCAB)
        found = propose(made, request_of(seed, temperature=temperature), budget, depth)
        assert 1 <= len(found) <= budget
        assert max(map(len, paths_of(found))) <= depth
        assert made.model.forwards <= depth, "a level is one forward"  # type: ignore[attr-defined]
        assert (found.parents < np.arange(len(found))).all()
        assert 0 <= found.key.min() <= found.key.max() < len(made.prior)
        drawn = rule != "coupled" and temperature > 0.0 and tree not in CHOSEN
        assert (found.laws is not None) == drawn == (found.origin is not Origin.CHOSEN)
        if not (drawn and rule == "multi"):
            assert len(set(paths_of(found))) == len(found)


@pytest.mark.parametrize("tree", [t for t in TREES if t not in CHOSEN and t != "chain"])
def test_siblings_stand_in_the_order_of_their_draws(tree: str) -> None:
    """Of every node the children are the first tokens to finish the race of its law, with noise of its own."""
    for seed in range(20):
        rows, request = random_rows(seed, VOCAB), request_of(seed)
        found = propose(tree_drafter(tree, Origin.DISTINCT, rows, VOCAB), request, 14)
        paths = [(), *paths_of(found)]
        read = set()
        for parent, kids in siblings_of(found).items():
            law = build_law(rows(paths[parent + 1]), request.params, (), ())
            place = (len(request.token_ids) * 4096 + parent + 1) * 64
            position = len(request.token_ids) + len(paths[parent + 1])
            read.add((position, place))
            words = Noise(seed).words(position, Stream.DRAFT, VOCAB, round_id=place)
            assert found.tokens[kids].tolist() == law.first(words, len(kids))[0].tolist()
        assert len(read) == len(siblings_of(found)), "no two nodes read the same noise"


@pytest.mark.parametrize("tree", ["branching:widths=3/2/1", "sequoia"])
def test_independent_siblings_repeat_and_have_their_law(tree: str) -> None:
    """The share of draws of each token at the root, whatever the rank, is the law's (five standard errors)."""
    rows = random_rows(3, 4)
    drafter = tree_drafter(tree, Origin.INDEPENDENT, rows, 4)
    tables = np.zeros((2, 4))
    repeats = 0
    for seed in range(1500):
        found = propose(drafter, request_of(seed), 3, 1)
        for rank, token in enumerate(found.tokens[:2].tolist()):
            tables[rank, token] += 1
        repeats += len(set(found.tokens.tolist())) < len(found)
    law = build_law(rows(()), request_of().params, (), ()).probabilities(4)
    assert repeats > 100
    for counts in tables:
        assert np.abs(counts / 1500 - law).max() < 5 * np.sqrt(0.25 / 1500)


@pytest.mark.parametrize(("tree", "budget", "expected"), [
    ("chain", 5, [1, 1, 1, 1, 1]),
    ("branching:widths=3/2/1", 15, [3, 6, 6]),
    ("branching:widths=3/2/1", 11, [3, 6, 2]),
    ("rsd-c:widths=2/2/2/1", 30, [2, 4, 8, 8, 8]),
    ("k-ary:k=3", 12, [3, 9]),
    ("rsd-s:width=4", 16, [4, 4, 4, 4]),
    ("rsd-s:width=4", 10, [4, 4, 2]),
])  # fmt: skip
def test_levels(tree: str, budget: int, expected: list[int]) -> None:
    found = propose(tree_drafter(tree, Origin.DISTINCT, random_rows(1, VOCAB), VOCAB), request_of(1), budget)
    depths = np.array([len(path) for path in paths_of(found)])
    assert np.bincount(depths)[1:].tolist() == expected


# Laws that run out of tokens


@pytest.mark.parametrize("tree", ["rsd-c:widths=5/2", "branching:widths=5", "k-ary:k=5", "sequoia"])
def test_an_exhausted_law_goes_on_with_the_rest(tree: str) -> None:
    """Under `recursive`: first what the law holds, then tokens it does not hold, none twice."""
    for seed in range(10):
        drafter = tree_drafter(tree, Origin.DISTINCT, random_rows(seed, 6), 6)
        found = propose(drafter, request_of(seed, top_k=2), 5, 1, np.full(len(drafter.prior), 0.05))
        assert found.laws is not None
        held = found.laws[0].ids
        assert held is not None
        assert len(found) == 5
        assert set(found.tokens[:2].tolist()) == set(held.tolist())
        assert len(set(found.tokens.tolist())) == 5


def test_beams_end_where_their_laws_do() -> None:
    for seed in range(10):
        drafter = tree_drafter("rsd-s:width=4", Origin.DISTINCT, random_rows(seed, 6), 6)
        found = propose(drafter, request_of(seed, top_k=2), 12)
        assert all(len(kids) <= 2 for kids in siblings_of(found).values())
        assert np.bincount([len(path) for path in paths_of(found)])[1:].tolist()[:3] == [2, 4, 4]


@pytest.mark.parametrize(("tree", "rule"), CASES)
def test_more_children_than_tokens(tree: str, rule: str) -> None:
    """A vocabulary of two, and a law that holds one of them."""
    for options in ({}, {"top_k": 1}, {"temperature": 0.0}):
        found = propose(tree_drafter(tree, ORIGINS[rule], random_rows(0, 2), 2), request_of(0, **options), 9, 3)
        assert 1 <= len(found) <= 9
        if rule != "multi":
            assert all(len(kids) <= 2 for kids in siblings_of(found).values())


# Grammars


class Alternating:
    """Even tokens at even places, odd ones at odd places, and an end after three."""

    def allowed(self, path: Sequence[int]) -> np.ndarray | None:
        return None if len(path) == 3 else np.arange(VOCAB) % 2 == len(path) % 2


@pytest.mark.parametrize(("tree", "rule"), CASES)
def test_trees_stay_within_the_grammar(tree: str, rule: str) -> None:
    constraint: Any = Alternating()
    for seed in range(6):
        drafter = tree_drafter(tree, ORIGINS[rule], random_rows(seed, VOCAB), VOCAB)
        found = propose(drafter, request_of(seed, constraint), 16)
        for path in paths_of(found):
            assert len(path) <= 3
            assert all(token % 2 == i % 2 for i, token in enumerate(path))


# Stochastic beams


def test_the_best_child_has_its_parents_value() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        values = np.sort(rng.gumbel(rng.normal(0, 5), 1.0, int(rng.integers(1, 9))))[::-1]
        parent = float(rng.normal(0, 5))
        found = conditioned(parent, values)
        assert found[0] == pytest.approx(parent, abs=1e-9)
        assert (np.diff(found) <= 0.0).all(), "the order of the draws stays"


def test_conditioned_values_follow_the_formula() -> None:
    """-log(exp(-G) - exp(-Z) + exp(-g)) where that can be computed as it is written."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = np.sort(rng.gumbel(0.0, 1.0, 5))[::-1]
        parent = float(rng.normal())
        naive = -np.log(np.exp(-parent) - np.exp(-values[0]) + np.exp(-values))
        assert conditioned(parent, values) == pytest.approx(naive, abs=1e-8)


def test_values_far_apart_stay_finite() -> None:
    found = conditioned(-3.0, np.array([40.0, -200.0, -1e5]))
    assert found[0] == -3.0
    assert np.isfinite(found[1])
    assert (np.diff(found) < 0.0).all()


def test_beams_are_the_first_of_all_sequences() -> None:
    """Sequences without replacement: the first kept leaf has each sequence's probability (five standard errors)."""
    rows = random_rows(5, 3)
    params = request_of().params
    law = {path: build_law(rows(path), params, (), ()).probabilities(3) for path in ((), (0,), (1,), (2,))}
    counts = np.zeros((3, 3))
    drafter = tree_drafter("rsd-s:width=2", Origin.DISTINCT, rows, 3)
    runs = 2000
    for seed in range(runs):
        found = propose(drafter, request_of(seed), 4, 2)
        first, second = paths_of(found)[2]  # the first node of the second level: the largest perturbed value
        counts[first, second] += 1
    for first, second in np.ndindex(3, 3):
        expected = law[()][first] * law[first,][second]
        assert abs(counts[first, second] / runs - expected) < 5 * np.sqrt(expected * (1 - expected) / runs)


# Best first


def cumulative(rows: Any, path: Sequence[int]) -> float:
    total = 1.0
    for i, token in enumerate(path):
        row = rows(tuple(path[:i])).astype(np.float64)
        total *= float(np.exp(row[token]) / np.exp(row).sum())
    return total


@pytest.mark.parametrize("budget", [1, 3, 6, 10])
def test_best_first_holds_the_most_probable_nodes_of_all(budget: int) -> None:
    """Against every path of up to four tokens over a vocabulary of four."""
    for seed in range(8):
        rows = random_rows(seed, 4, spread=0.8)
        found = propose(tree_drafter("best-first:expand=1,width=4", None, rows, 4), request_of(temperature=0.0), budget)
        everything = [path for n in range(1, 5) for path in itertools.product(range(4), repeat=n)]
        best = sorted((cumulative(rows, path) for path in everything), reverse=True)[:budget]
        assert max(map(len, paths_of(found))) <= 4, "or the brute force looked at too little"
        assert sorted((cumulative(rows, path) for path in paths_of(found)), reverse=True) == pytest.approx(best)


def test_best_first_with_wide_forwards_leaves_nothing_better_out() -> None:
    """Of the children that the forwards have shown, none that was left out beats one that was filled in at the end."""
    for seed in range(20):
        rows = random_rows(seed, 6, spread=1.0)
        found = propose(tree_drafter("best-first:expand=3,width=6", None, rows, 6), request_of(temperature=0.0), 14, 3)
        paths = paths_of(found)
        assert len(found) == 14
        expanded = {(), *paths[:6]}  # two forwards after the root's expanded three nodes each
        shown = {(*path, token) for path in expanded for token in range(6)}
        assert set(paths) <= shown
        left_out = max(cumulative(rows, path) for path in shown - set(paths))
        assert min(cumulative(rows, path) for path in paths[6:]) >= left_out


# Sequoia and CaPE


@pytest.mark.parametrize("rule", ORIGINS)
def test_sequoia_grows_the_planned_tree(rule: str) -> None:
    """Classes are sibling ranks, and the number of children is what the programme says for these estimates."""
    for estimates in (PRIOR, 0.9 * 0.2 ** np.arange(16), np.full(16, 0.06)):
        drafter = tree_drafter("sequoia", ORIGINS[rule], random_rows(7, 40), 40)
        found = propose(drafter, request_of(7), 20, 6, estimates)
        planned = tree_table(positional(estimates), 20, 6).tree(20, 6)
        assert found.parents.tolist() == [node.parent for node in planned]
        assert found.key.tolist() == [node.rank for node in planned]


def test_cape_widens_where_the_draft_is_unsure() -> None:
    widths = CapeShape(Origin.CHOSEN).candidates
    assert [widths(c) for c in (0.1, 0.3, 0.59, 0.6, 0.79, 0.8, 1.0)] == [
        8,
        6,
        6,
        4,
        4,
        2,
        2,
    ]
    for peak, count in ((0.1, 8), (2.2, 6), (3.5, 4), (6.0, 2)):  # largest probability 0.09, 0.45, 0.75, 0.97
        row = np.zeros(VOCAB, dtype=np.float32)
        row[5] = peak
        drafter = tree_drafter("cape", None, lambda _path, row=row: row, VOCAB)
        found = propose(drafter, request_of(temperature=0.0), 30, 3)
        kids = siblings_of(found)
        assert [len(kids[node]) for node in sorted(kids)] == [count] * 3
        assert sorted(kids) == [-1, 0, count], "the path goes through the first child of every node"
        assert found.tokens[[0, count]].tolist() == [5, 5]


# Settings


@pytest.mark.parametrize("tree", ["rsd-s:width=0", "branching:widths=0/2", "best-first:expand=0"])
def test_impossible_settings(tree: str) -> None:
    with pytest.raises(ConfigError):
        tree_drafter(tree, Origin.DISTINCT, random_rows(0, 4), 4)


@pytest.mark.parametrize(
    ("tree", "instead"), [("rsd-s:width=3", "recursive"), ("rsd-c:widths=2/3", r"branching:widths=2/3\.")]
)
def test_rsd_refuses_independent_draws(tree: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=f"without replacement.*{instead}"):
        tree_drafter(tree, Origin.INDEPENDENT, random_rows(0, 4), 4)


@pytest.mark.parametrize(
    "tree",
    [
        "branching:widths=" + "/".join("9" * 400),
        "branching:widths=257",
        "rsd-c:widths=2/1000000",
        "k-ary:k=0",
        "k-ary:k=100000",
        "rsd-s:width=257",
        "best-first:width=100000",
        "best-first:expand=257",
    ],
)
def test_no_number_of_a_shape_is_larger_than_a_draft(tree: str) -> None:
    with pytest.raises(ConfigError, match="from 1 to 256") as caught:
        create_shape(parse_tree(tree), Origin.DISTINCT)
    assert caught.value.field == "tree"
    assert caught.value.fix


def test_the_largest_numbers_are_drawn() -> None:
    for tree in ("branching:widths=" + "/".join(["256"] * 256), "k-ary:k=256", "rsd-s:width=256"):
        made = tree_drafter(tree, Origin.DISTINCT, random_rows(0, VOCAB), VOCAB)
        assert 1.0 <= made.width <= 256.0
        assert len(propose(made, request_of(0), 24, 4)) >= VOCAB


@pytest.mark.parametrize(("rule", "origin"), [(RecursiveRule(), Origin.DISTINCT), (MultiRule(), Origin.INDEPENDENT)])
@pytest.mark.parametrize("tree", [t for t in TREES if not t.startswith("rsd")])
def test_rules_take_what_shapes_claim(rule: AcceptanceRule, origin: Origin, tree: str) -> None:
    rows, target = random_rows(8, VOCAB), random_rows(9, VOCAB)
    for seed in range(20):
        drafter = tree_drafter(tree, origin, rows, VOCAB)
        request = request_of(seed, top_k=4)
        found: Proposal = propose(drafter, request, 12)
        walk = rule.accept(
            build("draft", found, drafter.prior),
            lambda _node, path, request=request: build_law(target(tuple(path)), request.params, (), ()),
            Noise(seed),
            len(request.token_ids),
            VOCAB,
        )
        assert len(walk.tokens) == len(walk.path) + 1
