"""RSD-S and Sequoia on a vocabulary of four: the law of what drafter, shape and rule commit, by many cheap rounds.

A stochastic beam conditions every beam's noise on its parent's, so its trees cannot be enumerated by forking at each
draw. Here the real drafter, shape and rule run on made-up logits, with real noise, round after round until two tokens
are there; a chi-square compares their joint law with the target's. Seeds are fixed: a test either always passes or
always fails, with odds of a false alarm of 1e-6. The same runs with siblings out of order must fail it, by far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from lossless.loop import FALSE_ALARM
from lossless.reference import chi_square
from shape_tools import propose, random_rows, request_of, tree_drafter

from paceline.draft.base import Proposal
from paceline.draft.tree import build
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request
from paceline.engine.rng import Noise
from paceline.engine.sampling import build_law
from paceline.verify.recursive import RecursiveRule

VOCAB = 4
FEW, MANY = 1_200, 100_000
BUDGET, DEPTH = 6, 2
P, Q = random_rows(33, VOCAB, spread=2.0), random_rows(84, VOCAB, spread=2.0)
TREES = ("rsd-s:width=3", "rsd-s:width=2", "rsd-c:widths=3/1", "sequoia")
Change = Callable[[Proposal, np.random.Generator], Proposal]


def as_drawn(made: Proposal, _rng: np.random.Generator) -> Proposal:
    """The tree as it is."""
    return made


def shuffled(made: Proposal, rng: np.random.Generator) -> Proposal:
    """Every level in another order: siblings no longer stand in the order of their draws."""
    depths = np.zeros(len(made), dtype=np.int64)
    for node, parent in enumerate(made.parents.tolist()):
        depths[node] = depths[parent] + 1 if parent >= 0 else 1
    order = np.lexsort((rng.random(len(made)), depths))
    return reordered(made, order)


def likeliest_first(made: Proposal, _rng: np.random.Generator) -> Proposal:
    """Siblings by falling draft probability, which is how a beam search without noise would list them."""
    assert made.laws is not None
    chance = [law.probabilities(VOCAB)[token] for law, token in zip(made.laws, made.tokens.tolist(), strict=True)]
    depths = np.array([1 if parent < 0 else 2 for parent in made.parents.tolist()])
    return reordered(made, np.lexsort((-np.array(chance), depths)))


def reordered(made: Proposal, order: np.ndarray) -> Proposal:
    new_id = np.full(len(made) + 1, -1, dtype=np.int64)
    new_id[order] = np.arange(len(made))
    assert made.laws is not None
    laws = tuple(made.laws[i] for i in order.tolist())
    return replace(made, tokens=made.tokens[order], parents=new_id[made.parents[order]], laws=laws)


def joint_counts(tree: str, runs: int, change: Change = as_drawn, **options: float) -> np.ndarray:
    """How often each pair of first two tokens was committed.  # [vocab, vocab]"""
    counts = np.zeros((VOCAB, VOCAB))
    rng = np.random.default_rng(0)
    for seed in range(runs):
        request = request_of(seed, **options)
        start = len(request.token_ids)
        while len(request.token_ids) < start + 2:
            done = tuple(request.token_ids[start:])
            request.token_ids += one_round(tree, done, request, change, rng)
        counts[tuple(request.token_ids[start : start + 2])] += 1
    return counts


def one_round(
    tree: str, done: tuple[int, ...], request: Request, change: Change, rng: np.random.Generator
) -> tuple[int, ...]:
    drafter = tree_drafter(tree, Origin.DISTINCT, lambda path: Q((*done, *path)), VOCAB)
    draft = build("draft", change(propose(drafter, request, BUDGET, DEPTH), rng), drafter.prior)
    walk = RecursiveRule().accept(
        draft,
        lambda _node, path: build_law(P((*done, *path)), request.params, (), ()),
        Noise(request.seed),
        len(request.token_ids),
        VOCAB,
    )
    return walk.tokens


def exact_joint(**options: float) -> np.ndarray:
    """The target's own.  # [vocab, vocab]"""
    params = request_of(0, **options).params
    first = build_law(P(()), params, (), ()).probabilities(VOCAB)
    rest = [build_law(P((token,)), params, (), ()).probabilities(VOCAB) for token in range(VOCAB)]
    return first[:, None] * np.stack(rest)


def distance(counts: np.ndarray, joint: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(counts / counts.sum() - joint).sum() / 2)


@pytest.mark.parametrize("tree", ["rsd-s:width=3"])
def test_the_joint_law_of_two_tokens(tree: str) -> None:
    assert chi_square(joint_counts(tree, FEW), exact_joint()) > FALSE_ALARM


@pytest.mark.parametrize("change", [shuffled, likeliest_first])
def test_siblings_out_of_order_are_caught(change: Change) -> None:
    counts = joint_counts("rsd-s:width=3", FEW, change)
    print(f"{change.__name__}: total variation {distance(counts, exact_joint()):.3f}")
    assert chi_square(counts, exact_joint()) < FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_the_joint_law_at_length(tree: str, options: dict[str, float]) -> None:
    """100,000 runs see a bias of one part in a hundred; the distance printed is mostly the noise of that many."""
    joint = exact_joint(**options)
    counts = joint_counts(tree, MANY, **options)
    p_value = chi_square(counts, joint)
    print(f"{tree} {options}: p={p_value:.3g}, total variation {distance(counts, joint):.4f}")
    assert p_value > FALSE_ALARM
