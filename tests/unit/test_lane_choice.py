"""Whether lanes pay: formulas against the clock, and the decision."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from paceline.errors import InputError
from paceline.lanes import choice
from paceline.lanes.choice import LaneTimes, choose
from paceline.lanes.clock import Clock
from paceline.lanes.pearl import Pearl
from paceline.lanes.plain import plain, speculation
from paceline.lanes.traces import made

TIMES = LaneTimes({1: 4.0, 4: 5.0, 8: 9.0}, 1.25)


def seconds_per_token(schedule: Callable[..., object], acceptance: float) -> float:
    """On the clock, over several texts."""
    total, tokens = 0.0, 0
    for seed in range(10):
        at = Clock({"draft": lambda n: n * TIMES.draft, "target": TIMES.forward})
        text = made(acceptance, 250, seed, spread=1e6).text()
        at.spawn(schedule(at, text))  # type: ignore[arg-type]
        at.run()
        total, tokens = total + text.times[-1], tokens + len(text.path)
    return total / tokens


@pytest.mark.parametrize("acceptance", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("length", [2, 6])
def test_formulas_are_the_clocks(length: int, acceptance: float) -> None:
    found = {
        "plain": (seconds_per_token(plain, acceptance), choice.no_lookahead(TIMES)),
        "speculation": (
            seconds_per_token(lambda at, t: speculation(at, t, length), acceptance),
            choice.speculation(TIMES, length, acceptance),
        ),
        "pearl": (
            seconds_per_token(lambda at, t: Pearl(length).run(at, t), acceptance),
            choice.pearl(TIMES, length, acceptance),
        ),
        "pre only": (
            seconds_per_token(lambda at, t: Pearl(length, post=False).run(at, t), acceptance),
            choice.pre_only(TIMES, TIMES, length, acceptance),
        ),
        "post only": (
            seconds_per_token(lambda at, t: Pearl(length, pre=False).run(at, t), acceptance),
            choice.post_only(TIMES, TIMES, length, acceptance),
        ),
    }
    for clock, formula in found.values():
        assert formula == pytest.approx(clock, rel=0.06)  # 2,500 tokens


def test_two_free_lanes_pay() -> None:
    free = LaneTimes({1: 4.0, 16: 4.0}, 1.0)
    best = choose(free, free, 0.8)
    assert best.lanes_pay
    assert best.length == 4
    assert best.gain == pytest.approx(1.27, abs=0.03)


def test_lanes_that_take_each_others_cores_do_not_pay() -> None:
    alone = LaneTimes({1: 4.0, 16: 4.0}, 1.0)
    beside = LaneTimes({1: 8.0, 16: 8.0}, 2.0)
    best = choose(alone, beside, 0.8)
    assert (best.name, best.gain, best.lanes_pay) == ("speculation", 1.0, False)
    assert best.seconds == pytest.approx(min(choice.speculation(alone, n, 0.8) for n in range(1, 17)))


def test_a_draft_that_is_never_right_is_left_out() -> None:
    times = LaneTimes({1: 4.0, 16: 6.0}, 1.0)
    slower = LaneTimes({1: 4.2, 16: 6.3}, 1.0)
    assert choose(times, slower, 0.0).name == "none"


def test_a_margin_keeps_small_gains_away() -> None:
    free = LaneTimes({1: 4.0, 16: 4.0}, 1.0)
    assert choose(free, free, 0.8, margin=1.2).lanes_pay
    assert not choose(free, free, 0.8, margin=1.5).lanes_pay


@pytest.mark.parametrize("target", [{}, {2: 1.0}, {1: 0.0}, {1: float("nan")}])
def test_times_that_are_none(target: dict[int, float]) -> None:
    with pytest.raises(InputError):
        LaneTimes(target, 1.0)


@pytest.mark.parametrize("acceptance", [-0.1, 1.0, 2.0])
def test_acceptance_out_of_range(acceptance: float) -> None:
    with pytest.raises(InputError, match="acceptance"):
        choose(TIMES, TIMES, acceptance)


def test_times_between_and_beyond_the_measured_ones() -> None:
    assert [TIMES.forward(n) for n in (1, 2, 4, 6, 8, 10)] == pytest.approx([4.0, 4.0 + 1 / 3, 5.0, 7.0, 9.0, 11.0])
    assert LaneTimes({1: 2.0}, 1.0).forward(9) == 2.0
