"""Acceptance as pure functions: the parts of `rejection`, what it refuses, greedy requests, and errors per request.

The laws of what the rules commit are enumerated in tests/lossless.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from paceline.bench.laws import make_tree, tree_of
from paceline.config import SamplingParams
from paceline.draft.base import chain
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree, Origin
from paceline.engine.request import Request
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law
from paceline.engine.types import DraftBatch, ScheduledBatch, ScheduledRequest, TargetScores, Walk
from paceline.errors import RuleViolation
from paceline.verify.accept import accept
from paceline.verify.registry import RULES
from paceline.verify.rejection import RejectionRule, accepts, residual

VOCAB = 3


# `rejection`


def test_the_accept_test_is_the_ratio() -> None:
    assert accepts(0.2, 0.1, 1 - 2**-33)
    assert accepts(0.1, 0.1, 1 - 2**-33)
    assert not accepts(0.0, 0.1, 2**-33)
    uniforms = (np.arange(1000) + 0.5) / 1000
    assert sum(accepts(0.25, 0.8, u) for u in uniforms.tolist()) == round(1000 * 0.25 / 0.8)


def test_the_residual() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.6, 0.3])
    assert residual(p, q).tolist() == [1.0, 0.0, 0.0]
    assert residual(p, np.array([0.0, 0.0, 1.0])).tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert residual(p, p).tolist() == p.tolist()


def _reject(tree: DraftTree) -> Walk:
    noise = Noise(1)
    return RejectionRule().accept(tree, lambda _n, _p: Law(np.zeros(VOCAB, dtype=np.float32)), noise, 0, VOCAB)


DENSE = Law(np.array([0.0, 0.0, -np.inf], dtype=np.float32))
CUT = Law(np.zeros(2, dtype=np.float32), np.array([0, 1]))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (make_tree([0, 1], [-1, -1]), "branches"),
        (make_tree([0, 1, 2], [-1, 0, 0]), "branches"),
        (replace(make_tree([0], [-1]), origin=Origin.DISTINCT), "no law"),
        (replace(make_tree([0, 1], [-1, 0]), origin=Origin.DISTINCT, laws=(CUT,)), "no law"),
        (tree_of(chain([0, 2], [0, 0], (CUT, CUT))), "cannot have been drawn"),
        (tree_of(chain([2], [0], (DENSE,))), "cannot have been drawn"),
        (tree_of(chain([1], [0], (Law.point(0),))), "cannot have been drawn"),
    ],
)
def test_rejection_refuses_what_would_bias_it(tree: DraftTree, message: str) -> None:
    with pytest.raises(RuleViolation, match=message):
        _reject(tree)


def test_every_place_decides_once() -> None:
    """Accept, recover and bonus read different places, so no decision leans on another's noise."""
    flat = Law(np.zeros(VOCAB, dtype=np.float32))
    read: list[tuple[int, Stream]] = []

    class Watched(Noise):
        def words(self, position: int, stream: Stream, count: int) -> Any:
            read.append((position, stream))
            return super().words(position, stream, count)

    for seed in range(50):
        read.clear()
        walk = RejectionRule().accept(make_tree([0, 1], [-1, 0]), lambda _n, _p: flat, Watched(seed), 5, VOCAB)
        last = len(walk.path)
        places = [(5 + i, Stream.ACCEPT) for i in range(min(last + 1, 2))]
        assert read == [*places, (5 + last, Stream.TARGET if last == 2 else Stream.RESIDUAL)]


# The accept stage


def _stage(rule: str, rows: list[list[float]], tree: DraftTree, *params: SamplingParams) -> Any:
    """One step for as many requests as params, each with the same rows and tree."""
    requests = [
        Request(id=f"r{i}", token_ids=[0, 1], prompt_len=1, params=p, seed=i, sample_index=0)
        for i, p in enumerate(params)
    ]
    logits = torch.tensor(rows * len(params))
    scores = TargetScores(logits, tuple(range(0, len(logits), len(rows))))
    items = tuple(ScheduledRequest(request, 1, 1, samples=True) for request in requests)
    drafts = DraftBatch((tree,) * len(params))
    return accept(RULES[rule](), ScheduledBatch(items), drafts, scores, stop_ids=(2,))


GREEDY = SamplingParams(temperature=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_greedy_is_argmax_match_under_every_rule(rule: str) -> None:
    """Also on a branching tree, ties to the lowest id, and never by comparing probabilities."""
    tree = make_tree([0, 1, 2, 1], [-1, -1, 1, 2])
    rows = [[1.0, 2.0, 2.0], [9.0, 0.0, 0.0], [0.0, 1.0, 3.0], [5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert _stage(rule, rows, tree, GREEDY).walks == (Walk((1, 2), (1, 2, 0)),)
    # The same with options that edit logits: the path is each node's history, and min_tokens masks token 2.
    edited = SamplingParams(temperature=0.0, min_tokens=3, max_tokens=9)
    assert _stage(rule, rows, tree, edited).walks == (Walk((1,), (1, 1)),)
    repeated = SamplingParams(temperature=0.0, frequency_penalty=1.5)
    assert _stage(rule, rows, tree, repeated).walks == (Walk((), (2,)),)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_end_only_their_request(rule: str, temperature: float, caplog: pytest.LogCaptureFixture) -> None:
    rows = [[0.0, float("nan"), 1.0]]
    masked = SamplingParams(temperature=temperature, min_tokens=9, max_tokens=9)
    fine = SamplingParams(temperature=temperature)
    result = _stage(rule, rows, EMPTY_TREE, fine, fine)
    assert result.walks == (None, None)
    assert all("finite" in str(error) for error in result.errors.values())
    result = _stage(rule, [[-np.inf, -np.inf, 1.0]], EMPTY_TREE, fine, masked, fine)
    assert [walk and walk.tokens for walk in result.walks] == [(2,), None, (2,)]
    assert list(result.errors) == ["r1"]
    assert "failed in acceptance" in caplog.text


def test_a_false_claim_ends_only_its_request(caplog: pytest.LogCaptureFixture) -> None:
    result = _stage("rejection", [[0.0, 1.0, 2.0]] * 3, make_tree([0, 1], [-1, -1]), SamplingParams(), GREEDY)
    assert result.walks == (None, Walk((), (2,)))
    assert "branches" in str(result.errors["r0"])
    assert caplog.records
