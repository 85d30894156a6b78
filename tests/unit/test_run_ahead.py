"""A step launched before the one in flight is read changes nothing but the time it takes."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_tools import TOKEN_BYTES, greedy, llm, make_request, prompt_of, reference, run, text_of
from late_device import LateDevice

from paceline import SamplingParams
from paceline.engine.engine import Engine
from paceline.engine.request import FinishReason, Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.errors import RequestError
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
SPECULATION = ["none", "auto", "ngram:k=4", "recycling:k=8", "prediction:k=5"]


def late(speculation: str = "none", **options: Any) -> tuple[Engine, LateDevice]:
    """An engine over a device that computes as late as it may."""
    engine = llm(speculation, **options).engine
    device = LateDevice(engine.runner, engine.vocab_size)
    engine.runner._native, engine.runner._graphs = None, device  # type: ignore[assignment]
    return engine, device


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


class _Sometimes:
    """Looks ahead in every sixth step, and knows in which."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._step = 0

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        self._step += 1
        plan: SpecPlan = self._policy.plan(batch, max_model_len)
        return plan if self._step % 6 == 0 else replace(PLAIN, observers=frozenset())

    def rests(self, batch: ScheduledBatch) -> bool:
        assert all(item.carried is not None for item in batch.items)
        return (self._step + 1) % 6 != 0

    def learn(self, stats: StepStats) -> None:
        self._policy.learn(stats)

    def forget(self, request: Request) -> None:
        self._policy.forget(request)


def test_a_policy_that_rests_is_launched_ahead_and_one_that_looks_is_not() -> None:
    engine, device = late("ngram:k=4")
    engine.stages = replace(engine.stages, policy=_Sometimes(engine.stages.policy))
    requests = [make_request(prompt_of(20, seed), greedy(30)) for seed in range(4)]
    run(engine, requests)
    assert [tuple(r.output_ids) for r in requests] == [reference(prompt_of(20, seed), 30) for seed in range(4)]
    steps = [line.startswith("carry") for line in device.log if not line.startswith("read")]
    assert steps[:6] == [False, True, True, True, True, False]
    assert not any(steps[5::6])
    assert sum(r.stats.draft_tokens for r in requests) > 0


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

    def flaky(batch: Any, started: float) -> Any:
        if batch.items[0].carried is not None and not failed:
            failed.append(True)
            raise RuntimeError("no memory")
        return launch(batch, started)

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
        stats.append(engine.last_stats)
    passed = time.perf_counter() - started
    forward, steps = sum(s.forward_seconds for s in stats), sum(s.step_seconds for s in stats)
    assert forward <= passed * 1.001
    assert 0.8 * passed < steps <= passed * 1.001
