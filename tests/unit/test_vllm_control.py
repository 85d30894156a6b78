"""The scheduler's hooks and the controller, in a world of fakes: drafts are right with a given chance."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm_world import AsyncWorld, Clock, FakeAsyncScheduler, FakeRequest, FakeScheduler, World

from paceline.errors import ConfigError
from paceline.integrations.vllm.asking import BOARD
from paceline.integrations.vllm.clock import StepClock
from paceline.integrations.vllm.compatibility import judge
from paceline.integrations.vllm.controller import Controller
from paceline.integrations.vllm.draft_share import DraftShare
from paceline.integrations.vllm.first_costs import FirstCosts
from paceline.integrations.vllm.hooks import PacedScheduler
from paceline.integrations.vllm.options import Options, request_speculation
from paceline.integrations.vllm.step import Method, Result, Step


class Paced(PacedScheduler, FakeScheduler):
    """As the factory makes it."""


class PacedAsync(PacedScheduler, FakeAsyncScheduler):
    """The same under async scheduling."""


@pytest.fixture(autouse=True)
def _clean_board() -> Any:
    yield
    BOARD.drafter, BOARD.length, BOARD.seconds = False, None, 0.0


def world(requests: int, *, most: int = 4, options: Options | None = None, method: Any = None, **habits: Any) -> World:
    """A paced world; `habits` are the world's."""
    clock = Clock()
    is_async = habits.pop("is_async", False)
    scheduler = PacedAsync(most) if is_async else Paced(most)
    made = Method("ngram", most, shows_drafts=not is_async, **(method or {}))
    scheduler.pace_with(Controller(made, options or Options(metrics=False), 100_000), None)
    scheduler._clock = StepClock(clock)
    controller = scheduler._controller
    controller.spent = lambda *_: setattr(controller, "_every", 4)  # otherwise real time decides how often is planned
    for i in range(requests):
        scheduler.add(FakeRequest(str(i)))
    return (AsyncWorld if is_async else World)(scheduler, clock, **habits)


def linear(fixed: float, per_token: float) -> Callable[[int], float]:
    return lambda tokens: fixed + per_token * tokens


def verified(w: World, steps: int = 200) -> float:
    """Draft tokens verified a request and step, lately."""
    return float(np.mean(w.verified[-steps:])) / len(w.scheduler.running)


@pytest.mark.parametrize("is_async", [False, True])
def test_looks_far_where_slots_are_free_and_drafts_are_good(is_async: bool) -> None:
    w = world(4, right=0.85, step_seconds=linear(0.01, 1e-6), is_async=is_async)
    w.steps(400)
    assert verified(w) > 3.0


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("requests", [1, 8, 64])
def test_zero_within_a_hundred_steps_where_drafting_loses(requests: int, is_async: bool) -> None:
    w = world(requests, right=0.15, step_seconds=linear(0.01, 5e-4), draft_seconds=0.005, is_async=is_async)
    w.steps(100)
    w.steps(300)
    assert np.mean(np.array(w.asked[-300:]) > 0) < 0.08
    assert verified(w, 300) < 0.25


def test_a_look_lasts_one_step_however_seldom_is_planned() -> None:
    w = world(64, right=0.15, step_seconds=linear(0.01, 5e-4), draft_seconds=0.005)
    controller = w.scheduler._controller
    controller.spent = lambda *_: setattr(controller, "_every", 32)
    w.steps(1000)
    runs = "".join("x" if n else " " for n in w.asked[300:]).split()
    assert runs, "looks come now and then"
    assert max(map(len, runs)) <= 2


def test_as_fast_as_plain_decoding_where_drafting_loses() -> None:
    habits = {"right": 0.15, "step_seconds": linear(0.01, 5e-4), "draft_seconds": 0.005}
    w = world(16, **habits)
    w.steps(200)
    tokens, time = w.tokens, w.clock.time
    w.steps(600)
    rate = (w.tokens - tokens) / (w.clock.time - time)
    plain = 16 / habits["step_seconds"](16)
    assert rate > 0.96 * plain


def test_requests_get_lengths_of_their_own() -> None:
    w = world(8, right=0.5, step_seconds=linear(0.01, 1e-3))
    good = {"0", "1"}
    plain = w._sample
    w._sample = lambda drafts, kept: (setattr(w, "right", 0.95 if w.current in good else 0.1), plain(drafts, kept))[1]
    w.steps(800)
    wanted = w.scheduler._controller.wanted
    assert min(wanted[name] for name in good) > max(n for name, n in wanted.items() if name not in good)


def test_a_cap_and_an_opt_out_hold_in_every_step() -> None:
    w = world(0, right=0.9, step_seconds=linear(0.01, 1e-6))
    w.scheduler.add(FakeRequest("free"))
    w.scheduler.add(FakeRequest("capped", extra_args={"paceline_cap": 2}))
    w.scheduler.add(FakeRequest("off", extra_args={"paceline_off": 1}))
    most: dict[str, int] = {}
    schedule = FakeScheduler.schedule

    def watched(self: Any) -> Any:
        output = schedule(self)
        for name, drafts in output.scheduled_spec_decode_tokens.items():
            most[name] = max(most.get(name, 0), len(drafts))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeScheduler, "schedule", watched)
        w.steps(300)
        w.scheduler.add(FakeRequest("late", extra_args={"paceline_cap": 1}))
        w.steps(100)
    assert most == {"free": 4, "capped": 2, "late": 1}


def test_uniform_takes_one_length_of_the_listed() -> None:
    w = world(6, most=5, right=0.8, step_seconds=linear(0.01, 1e-6), method={"lengths": (0, 2, 4), "forwards": True})
    w.steps(400)
    assert set(w.asked) <= {0, 2, 4}
    assert {n % 6 for n in w.verified[120:]} == {0}
    assert verified(w) > 1.5


def test_drafts_that_come_unasked_are_only_trimmed() -> None:
    w = world(32, right=0.1, step_seconds=linear(0.01, 1e-3), method={"steerable": False})
    w.steps(400)
    assert set(w.asked) == {4}
    assert w.scheduler.dynamic_sd_lookup is None, "the suffix method dies of a table"
    assert verified(w) < 0.3


def test_a_cut_does_not_depend_on_the_drafted_tokens() -> None:
    """Two worlds that differ in draft tokens only (and not in how many are right) verify the same."""
    counts = []
    for offset in (0, 500_000):
        w = world(8, right=0.6, step_seconds=linear(0.01, 3e-4))
        w.offset = offset
        w.steps(300)
        counts.append(w.verified)
    assert counts[0] == counts[1]


def test_an_exception_is_logged_once_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    w = world(2, right=0.8)
    w.steps(5)

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    w.scheduler._controller.answer = broken
    with caplog.at_level(logging.ERROR, logger="vllm.paceline"):
        w.steps(20)
    assert [r.message for r in caplog.records if "left a step" in r.message] != []
    assert len(caplog.records) == 2, "one for the error, one for switching off"
    assert w.scheduler._controller is None
    assert verified(w, 5) == 4, "as stock vLLM would"


def test_finished_and_aborted_requests_leave_nothing_behind() -> None:
    w = world(4, right=0.7)
    w.steps(60)
    for i in range(40):
        w.scheduler.add(FakeRequest(f"n{i}", max_tokens=5))
        w.steps(2)
        if i % 3 == 0 and f"n{i}" in w.scheduler.requests:
            w.scheduler.finish(f"n{i}")
    w.steps(20)
    controller = w.scheduler._controller
    assert w.scheduler._errors == 0
    assert len(controller.estimates.requests._known) == len(w.scheduler._known) == 4
    assert set(controller.wanted) <= {"0", "1", "2", "3"}


def test_padding_is_no_rejection() -> None:
    """Under async scheduling the grammar may leave placeholders of drafts that never were."""
    controller = Controller(Method("eagle", 4, forwards=True, shows_drafts=False), Options(), 1000)
    w = world(1)
    request = w.scheduler._add(FakeRequest("a"))
    before = controller.estimates.tables()["eagle"].copy()
    output = SimpleNamespace(
        scheduled_spec_decode_tokens={"a": [-1] * 4},
        num_scheduled_tokens={"a": 5},
        num_invalid_spec_tokens={"a": 4},
        total_num_scheduled_tokens=5,
    )
    w.scheduler.requests["a"] = FakeRequest("a")
    step = controller.answer((request,), [4])
    step.asked = 4
    read = w.scheduler._read(step, output, SimpleNamespace(sampled_token_ids=[[7]], req_id_to_index={"a": 0}))
    assert step.kept == [0]
    controller.learn(step, read)
    np.testing.assert_array_equal(controller.estimates.tables()["eagle"], before)


def test_a_rejection_counts_against_its_position() -> None:
    controller = Controller(Method("ngram", 3), Options(), 1000)
    request = world(1).scheduler._add(FakeRequest("a"))
    step = controller.answer((request,), [3])
    step.kept = [3]
    controller.learn(step, Result([0], [2], [False], 0, 1, 0.01))
    first, second, third = (
        controller.estimates.tables()["ngram"]
        - Controller(Method("ngram", 3), Options(), 9).estimates.tables()["ngram"]
    ).tolist()
    assert first > 0 > second
    assert third == 0


def test_trimmed_drafts_are_judged_by_the_token_that_came() -> None:
    step = Step((), [3], [1], 4, 4, tokens=[[5, 6, 7]])
    assert step.was_right(0, [5, 6])
    assert not step.was_right(0, [5, 9])
    assert not step.was_right(0, [9])


def test_options_name_the_allowed_keys() -> None:
    with pytest.raises(ConfigError, match=r"no option lenght.*Allowed are enabled, mode"):
        Options.read({"paceline": {"lenght": 3}})
    with pytest.raises(ConfigError, match=r"additional-config.paceline.mode: must be one of"):
        Options.read({"paceline": {"mode": "fast"}})
    with pytest.raises(ConfigError, match="must be an object"):
        Options.read({"paceline": 3})
    assert Options.read({"other": 1}) == Options.read(None) == Options()
    assert Options.read({"paceline": {"lengths": [4, 0, 2, 2]}}).lengths == (0, 2, 4)


def test_request_arguments() -> None:
    assert request_speculation(None) is None
    assert request_speculation({"other": 1}) is None
    read = request_speculation({"paceline_cap": 2.0, "paceline_weight": 3, "paceline_off": "false"})
    assert read is not None
    assert (read.cap, read.weight, read.off) == (2, 3, False)
    assert request_speculation({"paceline_cap": "many"}) is None


def config(**changes: Any) -> Any:
    """The part of a `VllmConfig` that is read."""
    spec = SimpleNamespace(method=changes.pop("method", "ngram"), num_speculative_tokens=4)
    for name, value in changes.pop("spec", {}).items():
        setattr(spec, name, value)
    full = SimpleNamespace(has_full_cudagraphs=lambda: changes.get("full", False))
    return SimpleNamespace(
        speculative_config=spec,
        parallel_config=SimpleNamespace(data_parallel_size=changes.get("dp", 1), pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(async_scheduling=changes.get("is_async", False)),
        compilation_config=SimpleNamespace(cudagraph_mode=full),
        model_config=SimpleNamespace(enforce_eager=False),
    )


def test_stands_aside_where_it_does_not_fit() -> None:
    options = Options()
    unknown = judge("0.99.0", (), config(), options)
    assert unknown.method is None
    assert unknown.warns
    assert "0.32" in unknown.reason
    assert judge("0.32.0+cpu", (), config(), options).method is not None
    assert judge("0.32.0", ("schedule",), config(), options).warns
    own = judge("0.32.0", (), config(method="dspark", spec={"enable_adaptive_verification": True}), options)
    assert own.method is None
    assert "own adaptive verification" in own.reason
    assert judge("0.32.0", (), config(), Options(enabled=False)).method is None
    without = config()
    without.speculative_config = None
    assert judge("0.32.0", (), without, options).method is None


def test_the_mode_fits_method_and_backend() -> None:
    def method(options: Options | None = None, **changes: Any) -> Method:
        found = judge("0.32.0", (), config(**changes), options or Options()).method
        assert found is not None
        return found

    assert method().lengths is None
    assert method(full=True).lengths is None, "n-gram drafts are ragged anyway"
    assert method(method="eagle3", full=True).lengths == (0, 4)
    table = {"num_speculative_tokens_per_batch_size": [(1, 8, 3), (9, 64, 0)]}
    assert method(method="eagle3", full=True, spec=table).lengths == (0, 3)
    assert method(Options(mode="ragged"), method="eagle3", full=True).lengths is None
    assert method(Options(mode="uniform", lengths=(1, 9))).lengths == (0, 1, 4)
    assert not method(method="suffix").steerable
    assert not method(dp=2).steerable
    assert not method(method="custom_class").steerable
    BOARD.drafter = True
    assert method(method="custom_class").steerable
    assert not method(is_async=True).shows_drafts


def test_steps_are_timed_from_result_to_result_while_there_is_work() -> None:
    now = [0.0]
    clock = StepClock(lambda: now[0])
    first, now[0] = clock.scheduled(), 0.01
    second = clock.scheduled()  # the next is scheduled before the result of the first
    now[0] = 1.0
    assert clock.finished(first, busy=True) == pytest.approx(1.0)
    now[0] = 1.5
    assert clock.finished(second, busy=False) == pytest.approx(0.5)
    now[0] = 60.0
    third, now[0] = clock.scheduled(), 60.25
    assert clock.finished(third, busy=False) == pytest.approx(0.25), "a pause is no step's time"


def test_the_first_steps_tell_tokens_from_drafting() -> None:
    costs = FirstCosts()
    rng = np.random.default_rng(0)
    for i in range(20):
        asked, tokens = i % 4 in (0, 1), 5 if i % 4 in (1, 2) else 1
        seconds = (0.01 + 0.001 * tokens + 0.004 * asked) * (
            5.0 if i == 7 else float(np.exp(0.02 * rng.standard_normal()))
        )
        costs.add(tokens, 0, asked=asked, seconds=seconds)
    costs.add(500, 499, asked=False, seconds=0.9)
    table = costs.table()
    assert table.tokens == (1, 5, 500)
    np.testing.assert_allclose(table.seconds, (0.011, 0.015, 0.9), rtol=0.05)


def test_what_drafting_takes_is_what_steps_without_it_do_not() -> None:
    share = DraftShare()
    for _ in range(60):
        share.split(0.014, 0.010, 4, 4)
    assert share.expected(4, 4) == pytest.approx(0.004, rel=0.02)
    assert share.expected(4, 0) == 0.0
    assert share.split(0.014, 0.010, 4, 0) == 0.0


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import paceline.integrations.vllm as package

    monkeypatch.setattr(package, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"paceline\[vllm\]"):
        _ = package.scheduler
    with pytest.raises(AttributeError):
        _ = package.nothing
