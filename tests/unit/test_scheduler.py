"""Who runs when: budgets, order, preemption and memory. Drafts take what is left over and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_tools import TOKEN_BYTES, greedy, llm, make_blocks, make_request, prompt_of, reference, run, tree

from paceline import SamplingParams
from paceline.engine.draft_tree import EMPTY_TREE
from paceline.engine.engine import Engine
from paceline.engine.request import FinishReason, Request
from paceline.engine.types import DraftBatch, InFlight, ScheduledBatch
from paceline.schedule.scheduler import Scheduler


def scheduler(num_blocks: int = 64, seqs: int = 8, budget: int = 16, block_size: int = 4) -> Scheduler:
    return Scheduler(make_blocks(num_blocks, block_size), max_num_seqs=seqs, max_num_batched_tokens=budget)


def shares(batch: ScheduledBatch) -> dict[str, tuple[int, int, bool]]:
    return {item.request.id: (item.start, item.num_tokens, item.samples) for item in batch.items}


def advance(batch: ScheduledBatch) -> None:
    """What commit does, with one token per sampling request."""
    for item in batch.items:
        item.request.num_computed += item.num_tokens
        if item.samples:
            item.request.token_ids.append(7)


def test_prefill_is_chunked_within_the_budget() -> None:
    s = scheduler()
    s.add(make_request(range(40), id="long"))
    s.add(make_request(range(5), id="short"))
    seen = []
    for _ in range(4):
        batch = s.schedule()
        assert batch.num_tokens <= 16
        seen.append(shares(batch))
        advance(batch)
    assert seen == [
        {"long": (0, 16, False)},
        {"long": (16, 16, False)},
        {"long": (32, 8, True), "short": (0, 5, True)},
        {"long": (40, 1, True), "short": (5, 1, True)},
    ]


def test_running_requests_go_first() -> None:
    s = scheduler(budget=6)
    s.add(make_request(range(4), id="a"))
    advance(s.schedule())
    s.add(make_request(range(20), id="b"))
    assert shares(s.schedule()) == {"a": (4, 1, True), "b": (0, 5, False)}


def test_first_come_first_served_up_to_max_num_seqs() -> None:
    s = scheduler(seqs=2)
    a, b, c, d = (make_request(range(3), id=name) for name in "abcd")
    for r in (a, b, c, d):
        s.add(r)
    assert list(shares(s.schedule())) == ["a", "b"]
    s.finish(a)
    assert list(shares(s.schedule())) == ["b", "c"]
    s.finish(c)
    s.finish(b)
    assert list(shares(s.schedule())) == ["d"]
    s.finish(d)
    assert not s.has_work
    assert s.blocks.counts().free == 64


def test_a_big_request_is_not_overtaken_when_memory_runs_short() -> None:
    s = scheduler(num_blocks=6)
    s.add(make_request(range(16), id="runs"))
    advance(s.schedule())
    s.add(make_request(range(100, 116), id="big"))
    s.add(make_request(range(200, 203), id="small"))
    assert list(shares(s.schedule())) == ["runs"]


def test_the_youngest_is_preempted() -> None:
    s = scheduler(num_blocks=6)
    old, young = make_request(range(8), id="old"), make_request(range(50, 58), id="young")
    for r in (old, young):
        s.add(r)
    advance(s.schedule())
    for _ in range(4):  # both grow to three blocks
        advance(s.schedule())
    s.max_num_batched_tokens = 9  # a chunk of young's tokens would fit into the blocks that are left
    batch = s.schedule()  # old needs a fourth block
    assert list(shares(batch)) == ["old"], "nobody is admitted in a step that had to preempt"
    s.max_num_batched_tokens = 16
    assert (young.stats.preemptions, old.stats.preemptions) == (1, 0)
    assert (young.blocks, young.block_hashes, young.num_computed) == ([], [], 0)
    assert young.token_ids == [*range(50, 58), 7, 7, 7, 7, 7], "its tokens are kept"
    assert list(s.waiting) == [young]
    s.finish(old)
    assert shares(s.schedule()) == {"young": (0, 13, True)}


def test_a_preempted_request_comes_before_the_waiting_ones() -> None:
    s = scheduler(num_blocks=6, seqs=2)
    for name, start in (("a", 0), ("b", 50), ("c", 100)):
        s.add(make_request(range(start, start + 8), id=name))
    for _ in range(6):
        advance(s.schedule())
    assert [r.id for r in s.waiting] == ["b", "c"]


def test_siblings_wait_for_their_leader() -> None:
    s = scheduler()
    leader = make_request(range(24), id="leader")
    siblings = [make_request(range(24), id=f"s{i}", leader=leader, sample_index=i) for i in (1, 2)]
    for r in (leader, *siblings, make_request(range(50, 53), id="other")):
        s.add(r)
    for expected in ({"leader": (0, 16, False)}, {"leader": (16, 8, True), "other": (0, 3, True)}):
        batch = s.schedule()
        assert shares(batch) == expected, "another request passes the waiting siblings"
        advance(batch)
        s.blocks.publish(leader.blocks, leader.block_hashes, leader.token_ids, leader.num_computed, "")
    batch = s.schedule()
    assert shares(batch)["s1"] == shares(batch)["s2"] == (20, 4, True), "their prompt is found in the cache"
    assert siblings[0].blocks[:5] == siblings[1].blocks[:5] == leader.blocks[:5]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_siblings_of_an_ended_leader_go_on(reason: FinishReason) -> None:
    s = scheduler()
    leader = make_request(range(24), id="leader")
    s.add(leader)
    s.add(make_request(range(24), id="sibling", leader=leader))
    advance(s.schedule())
    leader.finish_reason = reason
    s.finish(leader)
    assert shares(s.schedule()) == {"sibling": (0, 16, False)}


def test_prompt_logprobs_take_no_prefix_hit() -> None:
    s = scheduler()
    first = make_request(range(12), id="first")
    s.add(first)
    advance(s.schedule())
    s.blocks.publish(first.blocks, first.block_hashes, first.token_ids, 12, "")
    s.add(make_request(range(12), id="hit"))
    s.add(make_request(range(12), greedy(prompt_logprobs=0), id="no-hit"))
    found = shares(s.schedule())
    assert found["hit"] == (8, 4, True)
    assert found["no-hit"][0] == 0


def chain_of(n: int) -> Any:
    return tree(list(range(n)), list(range(-1, n - 1)))


def test_drafts_are_cut_to_the_memory_that_is_left() -> None:
    s = scheduler(num_blocks=6)
    a, b = make_request(range(8), id="a"), make_request(range(50, 57), id="b")
    for r in (a, b):
        s.add(r)
    advance(s.schedule())
    batch = s.schedule()  # a holds three blocks (9 tokens), b two (8 tokens)
    fitted = s.reserve_drafts(batch, DraftBatch((chain_of(20), chain_of(3)), {"ngram": 0.5}))
    assert fitted.seconds == {"ngram": 0.5}
    assert [len(t) for t in fitted.trees] == [16 - 9, 0], "the last free block went to the first tree"
    assert fitted.trees[0].tokens.tolist() == list(range(7))
    assert (len(a.blocks), len(b.blocks)) == (4, 2)
    assert s.running == [a, b], "drafts preempt nobody"


def test_an_empty_tree_reserves_nothing() -> None:
    s = scheduler()
    s.add(make_request(range(8)))
    batch = s.schedule()
    before = s.blocks.counts()
    assert s.reserve_drafts(batch, DraftBatch((EMPTY_TREE,))).trees == (EMPTY_TREE,)
    assert s.blocks.counts() == before


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[InFlight]:
    """Every step the engine launches from now on."""
    steps: list[InFlight] = []
    launch = engine.launch

    def spy(batch: ScheduledBatch, started: float) -> InFlight:
        steps.append(launch(batch, started))
        return steps[-1]

    monkeypatch.setattr(engine, "launch", spy)
    return steps


PROMPTS = [prompt_of(n) for n in (3, 20, 33, 18)]
SPECULATION = ["none", "ngram:k=4", "recycling:k=20", "prediction:k=5+recycling:k=20"]


@pytest.mark.parametrize("speculation", SPECULATION)
def test_exactly_the_roots_and_nodes_go_through_the_network(speculation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMS-SD: tokens through the network are the prompt's plus the sum of 1 + drafts, nothing is padded."""
    engine = llm(speculation, enable_prefix_caching=False, max_num_batched_tokens=16).engine
    steps = watch(engine, monkeypatch)
    requests = [make_request(p, greedy(12), prediction_ids=reference(p, 12)[:8]) for p in PROMPTS]
    run(engine, requests)
    prefill = sum(len(p) - 1 for p in PROMPTS)
    spent = sum(r.stats.target_forwards + r.stats.draft_tokens for r in requests)
    assert engine.runner.num_tokens == prefill + spent
    assert all(step.batch.num_tokens <= 16 for step in steps), "drafts come on top of the budget, and only they"
    ragged = [sorted({len(t) for t in step.verified.trees}) for step in steps]
    assert speculation == "none" or any(len(sizes) > 1 for sizes in ragged)
    assert [tuple(r.output_ids) for r in requests] == [reference(p, 12) for p in PROMPTS]


@pytest.mark.parametrize("speculation", SPECULATION)
def test_every_step_writes_into_slots_of_its_own(speculation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm(speculation, max_num_batched_tokens=16).engine
    written: list[int] = []
    write = engine.runner.kv.write

    def spy(layer: int, slots: Any, keys: Any, values: Any) -> None:
        if layer == 0:
            assert len(set(slots.tolist())) == len(slots), "two tokens share a slot"
            written.append(len(slots))
        write(layer, slots, keys, values)

    monkeypatch.setattr(engine.runner.kv, "write", spy)
    for request in (requests := [make_request(p, greedy(12)) for p in PROMPTS]):
        engine.add(request)
    while engine.has_work:
        engine.step()
        blocks = engine.stages.scheduler.blocks
        assert blocks.counts().used == len({b for r in requests for b in r.blocks})
        for r in requests:
            assert len(r.blocks) <= blocks.blocks_for(len(r.token_ids)), "a rejected node keeps a block"
    assert sum(written) == engine.runner.num_tokens


@pytest.mark.parametrize("speculation", SPECULATION)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_changes_no_text(speculation: str, prefix_caching: bool) -> None:
    """Ten blocks for four requests that want up to five each; the text is that of `transformers`."""
    engine = llm(
        speculation,
        kv_cache_memory=10 * 8 * TOKEN_BYTES,
        block_size=8,
        max_model_len=80,
        max_num_batched_tokens=16,
        enable_prefix_caching=prefix_caching,
    ).engine
    blocks = engine.stages.scheduler.blocks
    assert blocks.num_blocks == 10
    requests = [make_request(p, greedy(24)) for p in PROMPTS]
    run(engine, requests)
    assert sum(r.stats.preemptions for r in requests) >= 2
    assert requests[0].stats.preemptions == 0, "the oldest is never preempted"
    assert [tuple(r.output_ids) for r in requests] == [reference(p, 24) for p in PROMPTS]


def test_preemption_changes_no_sampled_text() -> None:
    texts: list[list[list[int]]] = []
    for memory in (10 * 8 * TOKEN_BYTES, 400 * 8 * TOKEN_BYTES):
        engine = llm(
            "recycling:k=20", kv_cache_memory=memory, block_size=8, max_model_len=80, max_num_batched_tokens=16
        ).engine
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        requests = [make_request(p, params, seed=i) for i, p in enumerate(PROMPTS)]
        run(engine, requests)
        assert (sum(r.stats.preemptions for r in requests) > 0) == (not texts)
        texts.append([r.output_ids for r in requests])
    assert texts[0] == texts[1]


def scheduling_trace(speculation: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, tuple[int, int, bool]]]:
    """Who got how many committed tokens, step by step, while every draft is rejected."""
    engine = llm(
        speculation,
        kv_cache_memory=10 * 8 * TOKEN_BYTES,
        block_size=8,
        max_model_len=80,
        max_num_batched_tokens=16,
        enable_prefix_caching=False,  # drafts may take the blocks of cached prefixes, which are free to take
    ).engine
    steps = watch(engine, monkeypatch)
    requests: list[Request] = []
    for i, p in enumerate(PROMPTS):
        wrong = tuple(t + 1 if t < 95 else 3 for t in reference(p, 24))
        requests.append(make_request(p, greedy(24), id=str(i), prediction_ids=wrong))
    run(engine, requests)
    if speculation != "none":
        assert sum(len(t) for step in steps for t in step.verified.trees) > 50
        assert sum(r.stats.accepted_tokens for r in requests) == 0
    return [shares(step.batch) for step in steps]


def test_drafts_never_preempt_and_never_shrink_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts that are always rejected, every step schedules exactly what it would without speculation."""
    plain = scheduling_trace("none", monkeypatch)
    assert any(len(step) < 3 for step in plain)
    assert scheduling_trace("prediction:k=24", monkeypatch) == plain


def test_nodes_that_find_room_are_the_first_of_the_tree() -> None:
    draft = tree([1, 2, 3, 4, 5], [-1, -1, 0, 0, 2])
    s = scheduler(num_blocks=2)
    s.add(make_request(range(5)))
    (fitted,) = s.reserve_drafts(s.schedule(), DraftBatch((draft,))).trees
    assert fitted.tokens.tolist() == [1, 2, 3]
    assert np.array_equal(fitted.parents, [-1, -1, 0])
