"""The draft model: its cache follows what is committed, its blocks come back, and a perfect draft is all accepted."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from engine_tools import greedy, llm, loaded, make_blocks, make_request, make_runner, prompt_of, reference, run

from paceline import SamplingParams
from paceline.draft.base import DraftContext
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.shapes.chain import ChainShape
from paceline.engine import builder
from paceline.engine.draft_tree import Origin
from paceline.engine.engine import Engine
from paceline.engine.request import Request

PROMPTS = [prompt_of(n) for n in (3, 20, 33, 18)]


def drafter(seed: int = 0, num_blocks: int = 64, coupled: bool = True, max_tokens: int = 512) -> ModelDrafter:
    runner = make_runner("llama", num_blocks, 8, seed)
    shape = ChainShape(Origin.CHOSEN if coupled else Origin.DISTINCT)
    blocks = make_blocks(num_blocks, 8)
    return ModelDrafter(runner, blocks, vocab_size=96, coupled=coupled, shape=shape, max_tokens=max_tokens)


def draft(made: ModelDrafter, *wanted: tuple[Request, int]) -> list[list[int]]:
    return [p.tokens.tolist() for p in made.propose([DraftContext(r, budget) for r, budget in wanted])]


def engine_with(monkeypatch: pytest.MonkeyPatch, speculation: str, seed: int = 0, **options: object) -> Engine:
    """An engine whose draft model is the tiny one of that seed."""
    monkeypatch.setattr(builder, "load_model", lambda *_, **__: loaded("llama", seed))
    return llm(speculation, **options).engine


@pytest.mark.parametrize("max_tokens", [512, 7])
def test_a_greedy_draft_is_the_models_own_text(max_tokens: int) -> None:
    """With a small token budget prompts are computed over several steps, and drafts come when they are done."""
    made = drafter(max_tokens=max_tokens)
    requests = [make_request(p) for p in PROMPTS]
    expected = [list(reference(p, 6)) for p in PROMPTS]
    found: list[list[int]] = [[] for _ in PROMPTS]
    before = made.model.runner.num_tokens
    for _ in range(60):
        for i, tokens in enumerate(draft(made, *((r, 6) for r in requests))):
            assert tokens in ([], expected[i])
            found[i] = tokens or found[i]
        assert made.model.runner.num_tokens - before <= max_tokens + 6 * len(PROMPTS), "more than the budget"
        before = made.model.runner.num_tokens
    assert found == expected


def test_budgets_are_ragged() -> None:
    made = drafter()
    requests = [make_request(p) for p in PROMPTS]
    found = draft(made, *zip(requests, (1, 0, 5, 2), strict=True))
    assert found == [list(reference(p, 6)[:k]) for p, k in zip(PROMPTS, (1, 0, 5, 2), strict=True)]
    # One token per request and forward: prompts, and every draft token but each last one goes in.
    assert made.model.runner.num_tokens == (3 + 33 + 18) + (0 + 4 + 1)
    assert made.model.runner.num_forwards == 5


def test_the_cache_follows_rejections() -> None:
    """After any mix of acceptances and rejections it drafts what a fresh draft model would."""
    rng = np.random.default_rng(0)
    made = drafter()
    requests = [make_request(p) for p in PROMPTS]
    for _ in range(12):
        drafted = draft(made, *((r, 4) for r in requests))
        fresh = drafter()
        copies = [make_request(r.token_ids) for r in requests]
        assert drafted == draft(fresh, *((r, 4) for r in copies))
        for request, tokens in zip(requests, drafted, strict=True):
            accepted = int(rng.integers(0, 5))
            request.token_ids += [*tokens[:accepted], int(rng.integers(3, 96))]
        before = made.model.runner.num_tokens
        draft(made, *((r, 1) for r in requests))
        assert made.model.runner.num_tokens - before <= 2 * len(requests), "only the new tokens are computed"
        made.blocks.check()


def test_sitting_out_some_rounds_is_caught_up() -> None:
    made = drafter()
    request = make_request(PROMPTS[1])
    draft(made, (request, 4))
    request.token_ids += reference(PROMPTS[1], 9)
    draft(made, (request, 0))
    assert draft(made, (request, 3)) == [list(reference(PROMPTS[1], 12)[9:])]


def test_blocks_come_back() -> None:
    made = drafter()
    requests = [make_request(p) for p in PROMPTS]
    draft(made, *((r, 6) for r in requests))
    assert made.blocks.counts().used == sum(made.blocks.blocks_for(len(p) + 6) for p in PROMPTS)
    draft(made, *((r, 20) for r in requests))
    for request in requests:
        request.token_ids += [77]  # everything rejected: the blocks of the long drafts are given back
    draft(made, *((r, 1) for r in requests))
    assert made.blocks.counts().used == sum(made.blocks.blocks_for(len(p) + 1 + 1) for p in PROMPTS)
    for request in requests:
        made.forget(request)
    made.blocks.check()
    assert made.blocks.counts().used == 0


def test_without_room_it_proposes_nothing_and_holds_nothing() -> None:
    made = drafter(num_blocks=4)
    short, long = make_request(PROMPTS[1]), make_request(PROMPTS[2])
    assert draft(made, (short, 4), (long, 4)) == [list(reference(PROMPTS[1], 4)), []]
    assert made.blocks.counts().used == 3
    made.forget(short)
    assert draft(made, (long, 0)) == [[]]
    made.blocks.check()


def test_laws_are_carried_only_where_a_rule_needs_them() -> None:
    params = SamplingParams(temperature=0.7, top_k=5, max_tokens=8)
    for coupled in (True, False):
        (proposal,) = drafter(coupled=coupled).propose([DraftContext(make_request(PROMPTS[0], params), 4)])
        assert (proposal.laws is None) == coupled
        if proposal.laws is not None:
            for token, law in zip(proposal.tokens.tolist(), proposal.laws, strict=True):
                assert law.ids is not None
                assert token in law.ids
                assert len(law.ids) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_drafts_for_itself_is_always_right(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `coupled` every draft of the model itself is accepted, sampled ones too: k + 1 tokens per forward."""
    k = 4
    engine = engine_with(monkeypatch, f"draft:model=self,k={k}")
    params = SamplingParams(temperature=temperature, max_tokens=5 * (k + 1), ignore_eos=True)
    requests = [make_request(p, params, seed=i) for i, p in enumerate(PROMPTS)]
    run(engine, requests)
    for request in requests:
        assert request.stats.target_forwards == 5
        assert request.stats.accepted_tokens == request.stats.draft_tokens == 5 * k
        assert request.stats.accepted_by == {"draft": 5 * k}
    blocks = engine.stages.drafting.drafters["draft"].blocks
    blocks.check()
    assert blocks.counts().used == 0


@pytest.mark.parametrize("speculation", ["draft:model=other,k=4", "draft:model=other,k=3+recycling:k=12"])
@pytest.mark.parametrize("options", [{}, {"rule": "rejection"}, {"tree": "chain"}])
def test_another_models_drafts_change_nothing(
    speculation: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(monkeypatch, speculation, seed=1, max_num_batched_tokens=16, **options)
    requests = [make_request(p, greedy(16)) for p in PROMPTS]
    run(engine, requests)
    assert [tuple(r.output_ids) for r in requests] == [reference(p, 16) for p in PROMPTS]
    assert sum(r.stats.draft_tokens for r in requests) > 50
    assert engine.stages.drafting.drafters["draft"].blocks.counts().used == 0


def test_aborts_and_failures_give_its_blocks_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    engine = engine_with(monkeypatch, "draft:model=self,k=4")
    made = engine.stages.drafting.drafters["draft"]
    requests = [make_request(p, greedy(16)) for p in PROMPTS]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.abort(requests[0].id)
    forward = made.model.runner.forward
    calls = 0

    def broken(batch: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("the draft model fails")
        return forward(batch)

    monkeypatch.setattr(made.model.runner, "forward", broken)
    run(engine, requests, add=False)
    assert "draft" not in engine.stages.drafting.drafters
    assert [tuple(r.output_ids) for r in requests[1:]] == [reference(p, 16) for p in PROMPTS[1:]]
    made.blocks.check()
    assert made.blocks.counts().used == 0
