"""E1 for trees: `recursive` and `multi` commit exactly the target's law, by full enumeration (error below 1e-12).

Draft trees are drawn with and without replacement, with every sampling option, with draft laws that run out of tokens;
the same checker rejects the variants that published code gets wrong, and the rules refuse what they can see is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lossless.test_enumeration import BROKEN, EXACT, WARPS

from paceline.bench.laws import (
    Context,
    ScriptedNoise,
    error_of,
    make_tree,
    random_laws,
    sampled_chain,
    sampled_tree,
    tree_of,
)
from paceline.config import SamplingParams
from paceline.draft.base import Proposal
from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.rng import Noise
from paceline.engine.sampling import Law
from paceline.errors import RuleViolation
from paceline.verify import recursive
from paceline.verify.base import AcceptanceRule
from paceline.verify.coupled import CoupledRule
from paceline.verify.multi import MultiRule
from paceline.verify.recursive import RecursiveRule

PLAIN = SamplingParams()
RULES = [(RecursiveRule(), Origin.DISTINCT), (MultiRule(), Origin.INDEPENDENT)]
SHAPES = [(3, (2,)), (3, (2, 1)), (4, (3,)), (2, (2, 2)), (5, (2,))]


@pytest.mark.parametrize(("rule", "origin"), RULES, ids=["recursive", "multi"])
@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize(("vocab", "widths"), SHAPES, ids=str)
def test_drawn_trees(rule: AcceptanceRule, origin: Origin, warp: str, vocab: int, widths: Sequence[int]) -> None:
    """Target and draft under the same options: the joint law of the first two tokens."""
    params = SamplingParams(**WARPS[warp])
    p, q = random_laws(1, vocab, params), random_laws(101, vocab, params)
    assert error_of(rule, p, sampled_tree(q, widths, origin, vocab), vocab, length=2) < EXACT


@pytest.mark.parametrize(("rule", "origin"), RULES, ids=["recursive", "multi"])
def test_chains_are_trees(rule: AcceptanceRule, origin: Origin) -> None:
    p, q = random_laws(2, 4, PLAIN), random_laws(102, 4, PLAIN)
    assert error_of(rule, p, sampled_chain(q, 2), 4, length=3) < EXACT
    assert error_of(rule, p, sampled_tree(q, (1, 1), origin, 4), 4, length=3) < EXACT


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 2}, {"min_p": 0.5}], ids=str)
def test_a_draft_law_that_runs_out_of_tokens(options: dict[str, Any]) -> None:
    """More siblings than the law holds: `recursive` goes on uniformly; also where the target holds fewer tokens."""
    wide, narrow = random_laws(3, 4, PLAIN), random_laws(103, 4, SamplingParams(**options))
    for p, q in ((wide, narrow), (narrow, wide), (narrow, random_laws(104, 4, SamplingParams(**options)))):
        assert error_of(RecursiveRule(), p, sampled_tree(q, (3,), Origin.DISTINCT, 4), 4, length=2) < EXACT
        assert error_of(MultiRule(), p, sampled_tree(q, (3,), Origin.INDEPENDENT, 4), 4, length=2) < EXACT
    assert error_of(RecursiveRule(), wide, sampled_tree(narrow, (4,), Origin.DISTINCT, 4), 4, length=2) < EXACT


CHOSEN = ([2, 0, 1, 1, 0], [-1, -1, 0, 0, 1])


@pytest.mark.parametrize("rule", [RecursiveRule(), MultiRule(), CoupledRule()], ids=lambda r: r.name)
@pytest.mark.parametrize("warp", WARPS)
def test_chosen_trees(rule: AcceptanceRule, warp: str) -> None:
    """Every child is a point mass, in any order."""
    p = random_laws(5, 3, SamplingParams(**WARPS[warp]))
    assert error_of(rule, p, _chosen(*CHOSEN), 3, length=3) < EXACT


def _chosen(tokens: Sequence[int], parents: Sequence[int]) -> Callable[..., Proposal]:
    arrays = np.array(tokens), np.array(parents), np.zeros(len(tokens), dtype=np.int64)
    return lambda _context, _noise, _position: Proposal(*arrays)


def test_a_perfect_draft_is_always_accepted() -> None:
    p = random_laws(9, 3, PLAIN)
    for rule, origin in RULES:
        assert error_of(rule, p, sampled_tree(p, (2, 1), origin, 3), 3, length=2) < EXACT


# Deliberately broken: the checker must see each of them.

P, Q = random_laws(20, 4, PLAIN), random_laws(21, 4, PLAIN)


def _not_renormalised(q: Any, tried: Sequence[int]) -> Any:
    left = q.copy()
    left[tried[-1]] = 0.0
    return left


def _shuffled(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
    """Siblings in the order of their ids instead of that of their draws."""
    made = sampled_tree(Q, (2,), Origin.DISTINCT, 4)(context, noise, position)
    order = np.argsort(made.tokens)
    return replace(made, tokens=made.tokens[order])


def _pruned(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
    """The least likely sibling is dropped after it was drawn."""
    made = sampled_tree(Q, (3,), Origin.DISTINCT, 4)(context, noise, position)
    kept = np.sort(np.argsort(-Q(context).probabilities(4)[made.tokens])[:2])
    return Proposal(made.tokens[kept], made.parents[kept], made.key[kept], (Q(context),) * 2, Origin.DISTINCT)


def _top_k_as_sampled(context: Context, _noise: ScriptedNoise, _position: int) -> Proposal:
    """The two likeliest tokens, passed off as drawn."""
    tokens = np.argsort(-Q(context).probabilities(4))[:2]
    return Proposal(tokens, np.array([-1, -1]), np.zeros(2, dtype=np.int64), (Q(context),) * 2, Origin.DISTINCT)


def test_a_draft_law_that_is_not_renormalised_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recursive, "without", _not_renormalised)
    assert error_of(RecursiveRule(), P, sampled_tree(Q, (3,), Origin.DISTINCT, 4), 4, length=1) > BROKEN


@pytest.mark.parametrize("draft", [_shuffled, _pruned, _top_k_as_sampled])
def test_false_claims_that_cannot_be_seen_are_biased(draft: Callable[..., Proposal]) -> None:
    assert error_of(RecursiveRule(), P, draft, 4, length=1) > BROKEN


def test_the_wrong_kind_of_draw_is_biased_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule, origin in ((RecursiveRule(), Origin.INDEPENDENT), (MultiRule(), Origin.DISTINCT)):
        draft = sampled_tree(Q, (2,), origin, 4)
        with pytest.raises(RuleViolation, match="replacement"):
            error_of(rule, P, draft, 4, length=1)
        with monkeypatch.context() as patch:
            patch.setattr(f"paceline.verify.{rule.name}.check_claims", lambda *_: None)
            assert error_of(rule, P, draft, 4, length=1) > BROKEN


DENSE = Law(np.zeros(3, dtype=np.float32))
OTHER = Law(np.array([0.0, 1.0, 0.0], dtype=np.float32))
SHORT = Law(np.zeros(2, dtype=np.float32), np.array([0, 1]))


def _drawn(tokens: Sequence[int], laws: Sequence[Law], origin: Origin = Origin.DISTINCT) -> DraftTree:
    tree = make_tree(tokens, [-1] * len(tokens))
    return replace(tree, origin=origin, laws=tuple(laws))


@pytest.mark.parametrize(
    ("rule", "tree", "message"),
    [
        (RecursiveRule(), _drawn([1, 1], [DENSE, DENSE]), "repeat"),
        (RecursiveRule(), _drawn([1, 2], [DENSE, OTHER]), "different draft laws"),
        (RecursiveRule(), _drawn([1, 2], [SHORT, SHORT]), "cannot have been drawn"),
        (RecursiveRule(), _drawn([2, 1], [SHORT, SHORT]), "cannot have been drawn"),
        (MultiRule(), _drawn([0, 2], [SHORT, SHORT], Origin.INDEPENDENT), "cannot have been drawn"),
        (RecursiveRule(), replace(make_tree([0, 1], [-1, -1]), laws=(DENSE, DENSE)), "chosen but carries laws"),
        (RecursiveRule(), replace(make_tree([0, 1], [-1, -1]), origin=Origin.DISTINCT), "no law"),
        (MultiRule(), _drawn([0, 1], [DENSE, DENSE]), "without replacement"),
        (RecursiveRule(), _drawn([0, 1], [DENSE, DENSE], Origin.INDEPENDENT), "with replacement"),
    ],
)
def test_what_can_be_seen_is_refused(rule: AcceptanceRule, tree: DraftTree, message: str) -> None:
    with pytest.raises(RuleViolation, match=message):
        rule.accept(tree, lambda _n, _p: DENSE, Noise(1), 0, 3)


def test_a_repeated_independent_draw_is_no_false_claim() -> None:
    tree = tree_of(
        Proposal(np.array([1, 1]), np.array([-1, -1]), np.zeros(2, dtype=np.int64), (DENSE, DENSE), Origin.INDEPENDENT)
    )
    assert MultiRule().accept(tree, lambda _n, _p: DENSE, Noise(1), 0, 3).tokens
