"""On devices that hide the host's work behind plain steps: what those take, what looks lose, who is looked at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine_tools import make_request, step_stats

from paceline.engine.flight import room_for_guesses
from paceline.engine.types import StepStats
from paceline.plan.base import PLAIN
from paceline.plan.regret import Regret
from paceline.plan.usage import Usage


def stats(seconds: float, *, ahead: bool = True, requests: int = 8, drafting: float = 0.0) -> StepStats:
    """Each request gets one token."""
    return step_stats(
        requests=[make_request([3, 4], id=f"r{i}") for i in range(requests)],
        step_seconds=seconds,
        ahead=ahead,
        draft_seconds={"ngram": drafting} if drafting else {},
    )


def test_plain_steps_are_timed_behind_others() -> None:
    regret = Regret()
    for step in range(1, 40):
        regret.learn(stats(0.003, ahead=False), step)
        regret.learn(stats(0.001), step)
    assert regret.seconds(8) == pytest.approx(0.001)


def test_where_none_can_be_launched_behind_another_any_plain_step_tells() -> None:
    """Also after a time in which they could."""
    regret = Regret()
    for step in range(1, 20):
        regret.learn(stats(0.001), step)
    for step in range(20, 60):
        regret.learn(stats(0.003, ahead=False), step)
    assert regret.seconds(8) == pytest.approx(0.003)
    assert not regret.is_due(8, 61)


def test_a_short_first_sample_is_soon_forgotten() -> None:
    """A step whose predecessor's samples were read late seems to take no time."""
    regret = Regret()
    regret.learn(stats(0.0001), 1)
    for step in range(2, 12):
        regret.learn(stats(0.001), step)
    assert regret.seconds(8) == pytest.approx(0.001, rel=0.2)


def test_a_plain_step_is_due_until_one_tells_something() -> None:
    regret = Regret()
    for step in range(1, 10):
        regret.learn(stats(0.001), step)
    assert not regret.is_due(8, 20)
    assert regret.is_due(8, 100)
    regret.learn(stats(0.003, ahead=False), 100)
    assert regret.is_due(8, 101), "it waited for the host"
    regret.learn(stats(0.001), 101)
    assert not regret.is_due(8, 102)


@pytest.mark.parametrize("requests", [[8], [8, 9, 10, 11, 12, 13, 14, 15]])
def test_what_looks_lose_is_a_small_share_of_the_time(requests: list[int]) -> None:
    """Every look takes two plain steps and brings one. Groups that shrink have no allowance for each size."""
    regret = Regret()
    lost, passed = 0.0, 0.0
    for step in range(1, 5000):
        count = requests[step % len(requests)]
        if regret.is_due(count, step):
            regret.learn(stats(0.001, requests=count), step)
            passed += 0.001
        else:
            regret.learn(stats(0.002, requests=count, drafting=0.0004), step)
            lost, passed = lost + 0.001, passed + 0.002
    assert 0.0 < lost < 0.03 * passed


def test_a_drafter_on_trial_is_asked_for_few_and_for_all_in_turn() -> None:
    usage = Usage()
    seen: set[int] = set()
    for look in range(8):
        few = usage.few("ngram", 16, 0.001)
        assert few is not None
        assert len(few) == 2
        seen |= set(few.tolist())
        if look == 0:
            assert few.tolist() == [0, 1]
    assert seen == set(range(16))
    assert usage.few("ngram", 2, 0.001) is None


def test_how_many_is_half_a_step_of_its_time() -> None:
    usage = Usage()
    made = replace(stats(0.002, requests=16, drafting=0.0004), asked={"ngram": 2}, gains={"ngram": 0.5})
    usage.learn(made, 8000.0, 0.0)
    gain, seconds = usage.rates()["ngram"]
    assert gain == pytest.approx(0.25), "per request that was asked for"
    assert seconds == pytest.approx(0.0002)
    few = usage.few("ngram", 16, 0.002)
    assert few is not None
    assert len(few) == 5
    usage.learn(replace(made, asked={"ngram": 0}), 8000.0, 0.0)
    assert usage.rates()["ngram"] == (gain, seconds), "nobody was asked for"


def test_a_guess_is_added_to_the_limit_of_those_who_have_one() -> None:
    class Item:
        class request:
            class params:
                max_tokens = 100

            num_output = 0
            token_ids = (1,)

    class Batch:
        sampling = (Item, Item, Item)

    plan = replace(PLAIN, budgets=np.array([4, 4, 0]), limits={"a": np.array([0, 3, 3]), "b": 2})
    wider = room_for_guesses(plan, Batch, 4096)  # type: ignore[arg-type]
    assert wider.budgets.tolist() == [5, 5, 0]
    assert np.asarray(wider.limits["a"]).tolist() == [0, 4, 4]
    assert wider.limits["b"] == 3
