"""Guesses: whatever is guessed, the draft is the same; what was guessed right costs no forward."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from engine_tools import greedy, make_blocks, make_request, make_runner, prompt_of, reference

from paceline import SamplingParams
from paceline.arrays import BoolArray
from paceline.draft.base import DraftContext, Proposal
from paceline.draft.guess import Guesser
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.shapes.registry import SHAPES, create_shape, parse_tree
from paceline.engine.draft_progress import DraftProgress
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request

PROMPTS = [prompt_of(n) for n in (3, 20, 33, 18)]
ORIGINS = {"coupled": Origin.CHOSEN, "distinct": Origin.DISTINCT, "independent": Origin.INDEPENDENT}
CASES = [c for c in itertools.product(SHAPES, ORIGINS) if not c[0].startswith("rsd") or c[1] != "independent"]


@dataclass
class Guessing:
    """Guesses what the test says, and notes what it is shown."""

    chains: Any
    most: int = 6
    learnt: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    forgotten: list[Request] = field(default_factory=list)

    def guess(self, request: Request, path: Sequence[int], most: int, depth: int) -> Iterable[Sequence[int]]:
        assert 0 < most <= self.most
        assert depth > 0
        found: Iterable[Sequence[int]] = self.chains(request, path)
        return found

    def learn(self, request: Request, path: Sequence[int], likeliest: Sequence[int]) -> None:
        self.learnt.append((tuple(request.token_ids), tuple(path), tuple(likeliest)))

    def forget(self, request: Request) -> None:
        self.forgotten.append(request)


def perfect(request: Request, path: Sequence[int]) -> list[tuple[int, ...]]:
    """The draft model's own greedy text."""
    text = (*request.token_ids, *path)
    return [reference(text, 12)]


def half_right(request: Request, path: Sequence[int]) -> list[tuple[int, ...]]:
    text = reference((*request.token_ids, *path), 4)
    return [(text[0], 5, 6), text[:2], (7, 7, 7)]


def at_random(request: Request, path: Sequence[int]) -> list[list[int]]:
    return np.random.default_rng((len(request.token_ids), len(path))).integers(0, 96, (3, 4)).tolist()  # type: ignore[no-any-return]


GUESSES = {
    "nothing": lambda *_: [],
    "empty": lambda *_: [(), ()],
    "perfect": perfect,
    "half right": half_right,
    "random": at_random,
    "impossible": lambda *_: [(96, 5), (-1,), (5, 1 << 40), [9] * 200, (5, 5), (5, 5)],
}


def drafter(
    guesser: Guesser | None, num_blocks: int = 128, tree: str = "chain", rule: str = "coupled", **options: Any
) -> ModelDrafter:
    """Over the tiny model."""
    shape = create_shape(parse_tree(tree), ORIGINS[rule])
    runner, blocks = make_runner("llama", num_blocks, 8), make_blocks(num_blocks, 8)
    coupled = rule == "coupled"
    return ModelDrafter(runner, blocks, vocab_size=96, coupled=coupled, shape=shape, guess=guesser, **options)


def same(a: Proposal, b: Proposal) -> bool:
    """Nodes, classes and laws."""
    if (a.tokens.tolist(), a.parents.tolist(), a.key.tolist(), a.origin) != (
        b.tokens.tolist(),
        b.parents.tolist(),
        b.key.tolist(),
        b.origin,
    ):
        return False
    pairs = zip(a.laws or (), b.laws or (), strict=True)
    # A forward of more rows sums in another order.
    return all(np.allclose(x.probabilities(96), y.probabilities(96), atol=1e-4) for x, y in pairs)


def rounds(
    made: ModelDrafter, params: SamplingParams, budgets: Sequence[int] = (6, 9, 0, 5), **context: Any
) -> list[Proposal]:
    """Three rounds of a ragged batch, of whose drafts a few tokens are accepted."""
    rng = np.random.default_rng(0)
    requests = [make_request(p, params, seed=i) for i, p in enumerate(PROMPTS)]
    found: list[Proposal] = []
    for turn in range(3):
        proposals = made.propose(
            [
                DraftContext(r, b, i, **context)
                for i, (r, b) in enumerate(zip(requests, np.roll(budgets, turn).tolist(), strict=True))
            ]
        )
        for request, proposal in zip(requests, proposals, strict=True):
            path, node = list[int](), -1
            for _ in range(rng.integers(0, 5)):
                node = next((i for i, parent in enumerate(proposal.parents.tolist()) if parent == node), len(proposal))
                if node == len(proposal):
                    break
                path.append(int(proposal.tokens[node]))
            request.token_ids += [*path, int(rng.integers(3, 96))]
        found += proposals
        made.blocks.check()
    for request in requests:
        made.forget(request)
    made.blocks.check()
    assert made.blocks.counts().used == 0
    return found


@pytest.mark.parametrize(("tree", "rule"), CASES)
def test_the_draft_does_not_depend_on_guesses(tree: str, rule: str) -> None:
    """For every shape, at temperature 0 and with tokens drawn under every kind of rule."""
    sampled = SamplingParams(temperature=0.8, top_k=4, max_tokens=40)
    for params, names in ((greedy(40), ("half right", "random")), (sampled, ("random", "impossible"))):
        plain = rounds(drafter(None, tree=tree, rule=rule), params)
        assert sum(map(len, plain)) > 40
        for name in names if tree != "chain" else GUESSES:
            guessed = rounds(drafter(Guessing(GUESSES[name]), tree=tree, rule=rule), params)
            assert len(guessed) == len(plain)
            assert all(same(a, b) for a, b in zip(guessed, plain, strict=True)), (name, params)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_perfect_guesser_saves_forwards_exactly(k: int, most: int) -> None:
    """A forward scores the newest node and `most` more."""
    guesser = Guessing(perfect, most)
    made = drafter(guesser)
    requests = [make_request(p) for p in PROMPTS]
    proposals = made.propose([DraftContext(r, k) for r in requests])
    assert [tuple(p.tokens) for p in proposals] == [reference(p, k) for p in PROMPTS]
    assert made.model.runner.num_forwards == -(-k // (most + 1))
    # Nothing is guessed that cannot be used: k nodes need k rows, the root's among them.
    assert made.model.runner.num_tokens == sum(map(len, PROMPTS)) + len(PROMPTS) * (k - 1)
    assert [(path, likeliest) for _, path, likeliest in guesser.learnt] == [
        (reference(p, k), reference(p, k)) for p in PROMPTS
    ]


def test_a_ragged_batch_needs_as_many_forwards_as_its_neediest() -> None:
    """Who guessed right runs ahead; who did not sets the number of forwards."""
    unlucky = make_request(PROMPTS[1])
    guesser = Guessing(lambda r, path: [] if r is unlucky else perfect(r, path), most=3)
    made = drafter(guesser)
    made.propose(
        [
            DraftContext(unlucky, 4),
            DraftContext(make_request(PROMPTS[0]), 16),
            DraftContext(make_request(PROMPTS[2]), 2),
        ]
    )
    assert made.model.runner.num_forwards == 4


def test_useless_guesses_cost_no_forward() -> None:
    made = drafter(Guessing(lambda r, path: [(perfect(r, path)[0][0] ^ 1, 5)]))
    made.propose([DraftContext(make_request(PROMPTS[0]), 6)])
    assert made.model.runner.num_forwards == 6


def test_the_kept_path_is_not_computed_again() -> None:
    """After wrong guesses stood before the draft in the cache, an accepted draft needs its last two tokens only."""
    made = drafter(Guessing(half_right))
    request = make_request(PROMPTS[1])
    (proposal,) = made.propose([DraftContext(request, 6)])
    request.token_ids += [*proposal.tokens.tolist(), 50]
    before = made.model.runner.num_tokens
    made._guesser = None
    (second,) = made.propose([DraftContext(request, 1)])
    assert made.model.runner.num_tokens - before == 2
    assert same(second, drafter(None).propose([DraftContext(make_request(request.token_ids), 1)])[0])


def test_guesses_take_nobodys_room() -> None:
    """At the longest length, and in a cache with room for the drafts alone, the drafts are the same."""
    params = greedy(40)
    longest = len(PROMPTS[2]) + 6
    for options in ({"max_model_len": longest}, {"num_blocks": 10}, {"num_blocks": 12}, {"num_blocks": 14}):
        plain = rounds(drafter(None, **options), params)
        for name in ("perfect", "random"):
            guessed = rounds(drafter(Guessing(GUESSES[name], most=20), **options), params)
            assert all(same(a, b) for a, b in zip(guessed, plain, strict=True)), (options, name)
    assert any(len(p) for p in plain)
    assert not all(len(p) for p in rounds(drafter(None, num_blocks=10), params)), "the cache was never short"


def test_the_room_of_guesses_is_given_back_at_once() -> None:
    made = drafter(Guessing(at_random, most=40))
    requests = [make_request(p) for p in PROMPTS]
    made.propose([DraftContext(r, 6) for r in requests])
    assert made.blocks.counts().used == sum(made.blocks.blocks_for(len(p) + 6) for p in PROMPTS)
    for request in requests:
        made.forget(request)
    assert made._guesser.forgotten == requests  # type: ignore[union-attr]


class _Even:
    """A grammar of even tokens, which ends after five."""

    def allowed(self, path: Sequence[int]) -> BoolArray | None:
        return np.arange(96) % 2 == 0 if len(path) < 5 else None


def test_under_a_grammar() -> None:
    found = []
    for guesser in (None, *(Guessing(chains) for chains in GUESSES.values())):
        request = make_request(PROMPTS[0], greedy(40), constraint=_Even())
        (proposal,) = drafter(guesser).propose([DraftContext(request, 9)])
        assert len(proposal) == 5
        assert all(proposal.tokens % 2 == 0)
        found.append(proposal)
    assert all(same(p, found[0]) for p in found)


class _Until:
    """Stops request 1 after two levels, everyone after four; notes what it was asked."""

    wants_hidden = True
    wants_top_probabilities = False

    def __init__(self) -> None:
        self.asked: list[DraftProgress] = []

    def keep(self, progress: DraftProgress) -> BoolArray:
        self.asked.append(progress)
        return (progress.depth < 4) & ~((progress.rows == 1) & (progress.depth == 2))


@pytest.mark.parametrize("tree", ["chain", "best-first:expand=2,width=3"])
def test_a_plan_that_stops_drafts_sees_the_same(tree: str) -> None:
    asked = []
    for guesser in (None, *(Guessing(chains) for chains in GUESSES.values())):
        keep = _Until()
        found = rounds(drafter(guesser, tree=tree), greedy(40), keep_drafting=keep)
        asked.append((found, keep.asked))
    plain, seen = asked[0]
    for guessed, also in asked[1:]:
        assert all(same(a, b) for a, b in zip(guessed, plain, strict=True))
        assert len(also) == len(seen)
        for a, b in zip(also, seen, strict=True):
            assert (a.depth, a.rows.tolist(), a.nodes.tolist()) == (b.depth, b.rows.tolist(), b.nodes.tolist())
            np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)
            np.testing.assert_allclose(a.hidden, b.hidden, atol=1e-3)
