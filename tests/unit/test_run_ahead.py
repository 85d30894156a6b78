"""A step launched before the one in flight is read changes nothing but the time it takes."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_tools import TOKEN_BYTES, greedy, llm, make_request, prompt_of, reference, run, text_of
from late_device import LateDevice

from paceline import SamplingParams
from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.engine.engine import Engine
from paceline.engine.request import FinishReason, Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.errors import RequestError
from paceline.model.runner import ForwardBatch, RowDraws
from paceline.plan.base import PLAIN

PROMPTS = [prompt_of(n) for n in (3, 20, 33, 18, 7, 12)]
DRAWN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "ignore_eos": False},
    {"stop": ["w5"]},
    {"stop_token_ids": [7, 11]},
]
"""What the device can draw by itself."""
READ: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"top_k": 5},
    {"repetition_penalty": 1.3},
    {"min_tokens": 4, "max_tokens": 12, "ignore_eos": False},
]
"""What needs logits."""
SPECULATION = ["none", "auto", "ngram:k=4", "recycling:k=8", "prediction:k=5", "ngram:k=3+suffix:max=8"]


def late(speculation: str = "none", **options: Any) -> tuple[Engine, LateDevice]:
    """An engine over a device that computes as late as it may."""
    engine = llm(speculation, **options).engine
    device = LateDevice(engine.runner, engine.vocab_size)
    engine.runner._native, engine.runner._graphs = None, device  # type: ignore[assignment]
    return engine, device


def learned_by(engine: Engine, also: Callable[[StepStats], None] = lambda _: None) -> list[StepStats]:
    """What the engine's policy will have learned from."""
    policy, found = engine.stages.policy, list[StepStats]()
    assert policy is not None
    learn = policy.learn

    def watch(stats: StepStats) -> None:
        found.append(stats)
        also(stats)
        learn(stats)

    policy.learn = watch  # type: ignore[method-assign]
    return found


def mixed(seed: int, kinds: list[dict[str, Any]], count: int = 24) -> list[Request]:
    """Requests of some kinds, the same for the same seed."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        options = {"temperature": 1.0, "max_tokens": rng.choice((1, 2, 3, 9, 20)), "ignore_eos": True}
        params = SamplingParams(**{**options, **rng.choice(kinds)})
        made.append(make_request(rng.choice(PROMPTS), params, id=f"r{i}", seed=rng.randrange(1 << 40)))
    return made


def texts(engine: Engine, requests: list[Request]) -> list[tuple[list[int], str, FinishReason | None]]:
    """What became of requests that come in one after the other."""
    pieces: dict[str, list[Any]] = {}
    waiting = list(requests)
    while waiting or engine.has_work:
        for request in waiting[:3]:
            engine.add(request)
        del waiting[:3]
        for item in engine.step().outputs:
            pieces.setdefault(item.request_id, []).append(item)
    engine.check()
    return [(r.output_ids, text_of(pieces[r.id]), r.finish_reason) for r in requests]


@pytest.mark.parametrize("speculation", SPECULATION)
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 4}, {"kv_cache_memory": 10 * 16 * TOKEN_BYTES}])
@pytest.mark.parametrize("kinds", [DRAWN, DRAWN + READ])
def test_outputs_are_those_of_steps_that_wait(
    speculation: str, options: dict[str, Any], kinds: list[dict[str, Any]]
) -> None:
    for seed in range(3):
        engine, device = late(speculation, **options)
        plain = llm("none").engine
        assert texts(engine, mixed(seed, kinds)) == texts(plain, mixed(seed, kinds))
        carried = sum(line.startswith("carry") for line in device.log)
        assert carried > 0 or speculation != "none" or kinds != DRAWN


def test_a_step_is_launched_before_the_one_in_flight_is_read() -> None:
    engine, device = late()
    request = make_request(PROMPTS[0], greedy(5))
    run(engine, [request])
    assert tuple(request.output_ids) == reference(PROMPTS[0], 5)
    order = ["launch 0", *[line for i in range(1, 5) for line in (f"carry {i}", f"read {i - 1}")], "read 4"]
    assert device.log == order, "and none is launched in vain where the length says who ends"


REPEATING = [(5, 6, 7, 8, 9) * 4, (11, 12, 13) * 6, prompt_of(20)]


@pytest.mark.parametrize("speculation", ["ngram:k=4", "suffix", "ngram:k=3+suffix:max=8"])
def test_drafts_are_made_before_their_root_is_known(speculation: str) -> None:
    """The first draft token guesses the root, and the others hang from it; they are worth something all the same."""
    engine, device = late(speculation)
    for _ in range(2):
        requests = [make_request(prompt, greedy(40)) for prompt in REPEATING]
        for request in requests:
            run(engine, [request])
        run(engine, again := [make_request(prompt, greedy(40)) for prompt in REPEATING])
        for r in (*requests, *again):
            assert tuple(r.output_ids) == reference(tuple(r.token_ids[: r.prompt_len]), 40)
            assert sum(r.stats.accepted_by.values()) == r.stats.accepted_tokens <= r.stats.draft_tokens
    assert device.drafts_behind > 0
    assert sum(r.stats.accepted_tokens for r in again) > 0


def test_a_wrong_guess_costs_no_more_than_its_nodes() -> None:
    """Every request gets its own sample, and the step after it is launched ahead again."""
    engine, device = late("ngram:k=4")
    drafter = engine.stages.drafting.drafters["ngram"]
    never = sorted(set(range(3, 90)) - set(reference(PROMPTS[1], 12)))[:3]
    asked: list[int] = []

    def propose(contexts: Sequence[DraftContext]) -> list[Proposal]:
        asked.append(len(contexts))
        return [NOTHING if len(asked) == 1 else chain(never, [0, 0, 0]) for _ in contexts]

    drafter.propose = propose  # type: ignore[method-assign]
    request = make_request(PROMPTS[1], greedy(12))
    learned = learned_by(engine)
    run(engine, [request])
    assert tuple(request.output_ids) == reference(PROMPTS[1], 12)
    assert request.stats.accepted_tokens == 0 < request.stats.draft_tokens
    behind = [s for s in learned if s.num_draft_nodes == 2]
    assert len(behind) >= 5, "two of three nodes hang from the guess"
    for stats in behind:
        assert stats.labels.accepted.tolist() == [False], "the guess is labelled, and nothing behind it"
        assert stats.labels.depth.tolist() == [1]
    carried = [line for line in device.log if not line.startswith("read")]
    assert sum(line.startswith("carry") for line in carried) >= len(carried) - 2


@pytest.mark.parametrize("speculation", ["recycling:k=8", "recycling:k=8+ngram:k=4"])
def test_drafters_that_look_at_the_forward_are_asked_when_it_was_read(speculation: str) -> None:
    engine, device = late(speculation)
    requests = [make_request(prompt, greedy(30)) for prompt in PROMPTS[:3]]
    run(engine, requests)
    assert [tuple(r.output_ids) for r in requests] == [reference(p, 30) for p in PROMPTS[:3]]
    assert device.drafts_behind == 0


class _Counting:
    """Plans as another policy does, and counts."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.plans = 0

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        self.plans += 1
        plan: SpecPlan = self._policy.plan(batch, max_model_len)
        return plan

    def learn(self, stats: StepStats) -> None:
        self._policy.learn(stats)

    def forget(self, request: Request) -> None:
        self._policy.forget(request)


def test_a_plan_that_cannot_be_followed_ahead_is_kept_for_the_step() -> None:
    """It may have used up what it does now and then only."""
    engine, device = late("recycling:k=8")
    policy = _Counting(engine.stages.policy)
    engine.stages = replace(engine.stages, policy=policy)
    request = make_request(PROMPTS[1], greedy(20))
    run(engine, [request])
    launched = sum(not line.startswith("read") for line in device.log)
    assert policy.plans == launched


def test_the_time_in_which_the_device_is_idle_is_the_price_of_the_nodes_before() -> None:
    engine, _ = late("prediction:k=4")
    learned: list[tuple[StepStats, bool]] = []
    learned_by(engine, lambda stats: learned.append((stats, any(r.finished for r in stats.requests))))
    launch, slow = engine.launch, 0.03

    def slowly(batch: ScheduledBatch, started: float, plan: SpecPlan | None = None) -> Any:
        if batch.items[0].carried is None:
            time.sleep(slow)
        return launch(batch, started, plan)

    engine.launch = slowly  # type: ignore[method-assign]
    request = make_request(PROMPTS[1], greedy(24), prediction_ids=reference(PROMPTS[1], 24))
    started = time.perf_counter()
    run(engine, [request])
    passed = time.perf_counter() - started
    charged = [s for s, last in learned if s.num_draft_nodes and not last]
    assert charged
    assert all(s.step_seconds > slow for s in charged)
    assert sum(s.step_seconds for s, _ in learned) <= passed * 1.001


@pytest.mark.parametrize("options", [{"logprobs": 1}, {"prompt_logprobs": 1}, {"presence_penalty": 1.0}])
def test_steps_that_need_logits_are_read_first(options: dict[str, Any]) -> None:
    engine, device = late()
    run(engine, [make_request(PROMPTS[1], greedy(6, **options))])
    assert not any(line == "carry 1" for line in device.log)


def test_a_grammar_decides_before_the_next_step() -> None:
    found = []
    for engine in (late()[0], llm("none").engine):
        request = make_request(PROMPTS[1], greedy(8), constraint=_Words())
        run(engine, [request])
        found.append(request.output_ids)
    assert found[0] == found[1] == [4, 5]


class _Words:
    """Allows 4, then 5, then the end."""

    def __init__(self) -> None:
        self._at = 0

    @property
    def finished(self) -> bool:
        return self._at == 2

    def advance(self, token: int) -> None:
        assert token == 4 + self._at
        self._at += 1

    def allowed(self, path: Any) -> np.ndarray:
        mask = np.zeros(96, dtype=np.bool_)
        mask[4 + self._at + len(path)] = True
        return mask


def test_requests_that_are_cancelled_in_flight_leave_no_trace() -> None:
    engine, _ = late(max_num_seqs=8)
    rng = random.Random(5)
    requests: dict[str, Request] = {}
    ended: list[tuple[str, FinishReason]] = []
    for i in range(400):
        if rng.random() < 0.5 and i < 300:
            request_id = f"r{rng.randrange(20)}"  # an id may come back when its request was cancelled
            if not any(r.id == request_id and engine.is_running(r) for r in requests.values()):
                request = make_request(rng.choice(PROMPTS), greedy(rng.choice((2, 8, 30))), id=request_id)
                with contextlib.suppress(RequestError):  # the cancellation of this id has not been reported yet
                    engine.add(request)
                    requests[request_id] = request
        if rng.random() < 0.4 and requests:
            engine.abort(rng.choice(list(requests)))
        for item in engine.step().outputs:
            if item.finish_reason is not None:
                ended.append((item.request_id, item.finish_reason))
                request = requests[item.request_id]
                if item.finish_reason is FinishReason.LENGTH:
                    assert tuple(request.output_ids) == reference(
                        tuple(request.token_ids[: request.prompt_len]), request.num_output
                    )
    while engine.has_work:
        engine.step()
    engine.check()
    assert {reason for _, reason in ended} == {FinishReason.LENGTH, FinishReason.ABORT}


def test_a_device_that_fails_ends_its_requests_and_no_others() -> None:
    engine, device = late()
    first = [make_request(prompt, greedy(12)) for prompt in PROMPTS[:3]]
    device.fail_at = 4
    news = run(engine, first)
    assert all(r.finish_reason is FinishReason.ERROR for r in first)
    assert all("the device failed" in (news[r.id][-1].error or "") for r in first)
    again = make_request(PROMPTS[0], greedy(6))
    run(engine, [again])
    assert tuple(again.output_ids) == reference(PROMPTS[0], 6)


def test_a_launch_that_fails_behind_another_is_tried_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = late()
    launch, failed = engine.launch, []

    def flaky(batch: Any, started: float, plan: Any = None) -> Any:
        if batch.items[0].carried is not None and not failed:
            failed.append(True)
            raise RuntimeError("no memory")
        return launch(batch, started, plan)

    monkeypatch.setattr(engine, "launch", flaky)
    request = make_request(PROMPTS[0], greedy(8))
    run(engine, [request])
    assert failed
    assert tuple(request.output_ids) == reference(PROMPTS[0], 8)


def test_times_of_steps_that_overlap_add_up_to_the_time_that_passed() -> None:
    engine, _ = late()
    engine.add(make_request(PROMPTS[0], greedy(40)))
    stats = []
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
        assert engine.last_stats is not None
        stats.append(engine.last_stats)
    passed = time.perf_counter() - started
    forward, steps = sum(s.forward_seconds for s in stats), sum(s.step_seconds for s in stats)
    assert forward <= passed * 1.001
    assert 0.8 * passed < steps <= passed * 1.001


def test_a_draft_of_one_token_is_verified_behind_its_guess() -> None:
    """The guess is no part of the length that was asked for."""
    engine, device = late("ngram:k=1")
    for prompt in REPEATING:
        request = make_request(prompt, greedy(60))
        run(engine, [request])
        assert tuple(request.output_ids) == reference(prompt, 60)
        assert request.stats.longest_draft <= 1
    assert device.drafts_behind > 0


def test_a_callback_may_run_the_engine_too() -> None:
    """What ends in a call from within is not waited for."""
    model = llm("none")
    inner: list[int] = []

    def on_finished(count: int) -> None:
        if not inner:
            inner.append(count)
            model.generate([PROMPTS[1]], greedy(30))

    found = model.generate([PROMPTS[0], PROMPTS[2]], [greedy(2), greedy(20)], on_finished=on_finished)
    assert [len(g.token_ids) for g in found] == [2, 20]


def test_an_id_that_comes_again_does_not_pay_for_the_one_before() -> None:
    """The step that fails was launched for a request that has ended since; the new one of its id goes on."""
    engine, device = late()
    first = make_request(PROMPTS[0], greedy(30), id="x")
    other = make_request(PROMPTS[1], greedy(30), id="y")
    engine.add(first)
    engine.add(other)
    for _ in range(3):
        engine.step()
    engine.abort("x")
    engine._news.clear()
    second = make_request(PROMPTS[2], greedy(6), id="x")
    engine.add(second)
    device.fail_at = len(device._launched) - 1
    run(engine, [])
    assert other.finish_reason is FinishReason.ERROR
    assert second.finish_reason is FinishReason.LENGTH
    assert tuple(second.output_ids) == reference(PROMPTS[2], 6)


def test_a_step_that_compiled_or_captured_is_not_learned_from() -> None:
    """Its time tells nothing of its kind."""
    engine, device = late("ngram:k=4")
    learned = learned_by(engine)
    request = make_request(REPEATING[0], greedy(30))
    engine.add(request)
    launch, slow = device.launch, list[int]()

    def capture(batch: ForwardBatch, draws: RowDraws) -> Any:
        if len(slow) < 3 and request.num_output > 8 * len(slow):
            slow.append(request.num_output)
            device.num_captures += 1
        return launch(batch, draws)

    device.launch = capture  # type: ignore[method-assign]
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    assert len(slow) == 3
    assert steps - 8 <= len(learned) <= steps - 3
    assert sum(s.num_committed for s in learned) < 30
    assert engine.last_stats is not None


def test_of_many_plain_steps_some_are_learned_from() -> None:
    """All at first, and every step's numbers are there for who asks."""
    engine, _ = late("auto")
    policy = engine.stages.policy
    assert policy is not None
    policy.plan = lambda *_: PLAIN  # type: ignore[method-assign]
    learned = learned_by(engine)
    engine.add(make_request(PROMPTS[0], greedy(100)))
    seen = []
    while engine.has_work:
        engine.step()
        assert engine.last_stats is engine.last_stats
        seen.append(engine.last_stats)
    assert len({id(stats) for stats in seen}) == len(seen) >= 100
    assert learned[:16] == seen[:16]
    assert 16 + 84 // 8 - 2 <= len(learned) <= 18 + 84 // 8


@pytest.mark.parametrize("speculation", ["auto", "ngram:k=4"])
def test_statistics_that_cannot_be_worked_out_cost_nobody_anything(
    speculation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> StepStats:
        raise ValueError("no statistics")

    engine, _ = late(speculation)
    learned = learned_by(engine)
    monkeypatch.setattr("paceline.engine.learning.step_stats", broken)
    request = make_request(REPEATING[0], greedy(30))
    run(engine, [request])
    assert request.finish_reason is FinishReason.LENGTH
    assert engine.last_stats is None
    assert not learned
