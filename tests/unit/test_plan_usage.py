"""Which drafters `auto` asks: useless ones in shadow, at a small share of all time, until they pay again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from engine_tools import step_stats
from plan_tools import SimDrafter, Step, World, flat_then_linear, goodput, steep

from paceline.engine.types import Tap
from paceline.plan.usage import DrafterUse, Usage


def steady(odds: float) -> Callable[..., float]:
    return lambda *_: odds


def asked(steps: list[Step], name: str) -> list[bool]:
    return [name in s.stats.draft_seconds for s in steps]


def share_of_time(steps: list[Step], name: str) -> float:
    spent = sum(s.stats.draft_seconds.get(name, 0.0) for s in steps)
    return spent / sum(s.stats.step_seconds for s in steps)


def test_a_useless_drafter_is_asked_in_shadow_only() -> None:
    """A look takes 2% of a step; it gets few steps, and its time stays below half a percent."""
    useless = SimDrafter(odds=steady(0.0), seconds=0.0002)
    steps = World([useless]).run(500)
    late = steps[100:]
    assert 1 / 64 < np.mean(asked(late, "ngram")) < 0.2
    assert share_of_time(late, "ngram") < 0.005
    assert sum(s.nodes for s in late) == 0, "and nothing of it is verified"
    assert all(len(s.stats.labels) for s in late if "ngram" in s.stats.draft_seconds), "but every look is labelled"
    plain = 1.0 / flat_then_linear(1)
    assert goodput(late) > 0.995 * plain


@pytest.mark.parametrize("seconds", [0.00002, 0.0002, 0.001])
def test_the_time_of_looks_is_bounded_for_cheap_and_dear_drafters(seconds: float) -> None:
    """Short looks come once in 64 steps at least, so one of a tenth of a step takes 0.15% of all time."""
    steps = World([SimDrafter(odds=steady(0.0), seconds=seconds)]).run(400)[100:]
    assert share_of_time(steps, "ngram") < 0.004
    looks = np.flatnonzero(asked(steps, "ngram"))
    assert np.diff(looks).max() <= 64


def test_it_comes_back_when_it_pays() -> None:
    """Useless for 200 steps, then nearly always right: asked in every step again within 50."""
    drafter = SimDrafter(odds=lambda step, *_: 0.0 if step < 200 else 0.97, seconds=0.0002)
    steps = World([drafter]).run(400)
    assert np.mean(asked(steps[100:200], "ngram")) < 0.2
    assert np.mean(asked(steps[250:], "ngram")) > 0.95
    assert np.mean([s.nodes for s in steps[250:]]) > 8


def test_one_good_look_is_enough() -> None:
    use = DrafterUse()
    for _ in range(100):
        use.learn(0.0, 0.001, 100.0)
    assert not use.pays(100.0)
    use.learn(2.0, 0.001, 100.0)
    for _ in range(15):
        assert use.pays(100.0), "it gets a second trial"
        use.learn(0.0, 0.001, 100.0)
    for _ in range(15):
        use.learn(0.0, 0.001, 100.0)
    assert not use.pays(100.0)


def test_a_look_must_pay_for_what_is_around_it() -> None:
    use = DrafterUse()
    for _ in range(100):
        use.learn(0.0, 0.001, 100.0)
    use.learn(0.3, 0.001, 100.0, around=0.003)
    assert not use.pays(100.0)
    use.learn(0.5, 0.001, 100.0, around=0.003)
    assert use.pays(100.0)


def test_what_is_around_drafters_is_measured_and_paid_for() -> None:
    """Steps in which two drafters find nothing take 2 ms more than others: alone, they must bring that as well."""
    usage = Usage()
    for seconds in (0.010, 0.012):
        asked = {"ngram": 0.0001, "suffix": 0.0001} if seconds > 0.01 else {}
        for _ in range(30):
            usage.learn(
                step_stats(forward_seconds=0.009, step_seconds=seconds + sum(asked.values()), draft_seconds=asked),
                100.0,
                0.0,
            )
    assert usage.around == pytest.approx(0.002, rel=0.05)
    for gain, pays in ((0.05, False), (0.15, True)):
        for _ in range(100):
            drafts = {"ngram": 0.0001, "suffix": 0.0001}
            gains = dict.fromkeys(drafts, gain)
            usage.learn(
                step_stats(forward_seconds=0.009, step_seconds=0.0122, draft_seconds=drafts, gains=gains), 100.0, 0.0
            )
        both = ["ngram", "suffix"]
        assert usage.paying(both, 1, 100.0, alone=False) == both
        assert usage.paying(both, 1, 100.0, alone=True) == (both if pays else [])


def test_a_drafter_is_tried_before_it_is_judged() -> None:
    use = DrafterUse()
    for _ in range(7):
        use.learn(0.0, 1.0, 100.0)
        assert use.pays(100.0)
    use.learn(0.0, 1.0, 100.0)
    assert not use.pays(100.0)


def test_a_pause_of_the_machine_is_not_held_against_a_drafter() -> None:
    use = DrafterUse()
    for _ in range(20):
        use.learn(0.5, 0.001, 100.0)
    use.learn(0.5, 1000.0, 100.0)
    assert use.seconds < 0.0014
    assert use.pays(100.0)


def test_where_no_node_can_pay_all_are_in_shadow() -> None:
    """Not even a certain token would pay for its slot: a drafter that was right so far is asked now and then only."""

    def hopeless(tokens: float) -> float:
        return 0.001 + 0.02 * max(tokens - 1.0, 0.0)

    steps = World([SimDrafter(odds=steady(0.95), seconds=0.0001)], seconds=hopeless).run(200)[20:]
    assert np.mean(asked(steps, "ngram")) < 0.05
    assert sum(s.nodes for s in steps) == 0


def test_only_those_asked_watch() -> None:
    """Observations are shown to the drafters of the plan; learning from them is part of their time."""
    good = SimDrafter("ngram", odds=steady(0.9), taps=frozenset({Tap.TOP_IDS}))
    useless = SimDrafter("recycling", odds=steady(0.0), seconds=0.001, taps=frozenset({Tap.TOP_IDS}))
    world = World([good, useless], requests=2)
    for step in world.run(200):
        assert step.plan.observers == frozenset(step.plan.drafters)
    looks = sum(asked([world.step()], "recycling")[0] for _ in range(100))
    assert looks < 10
    before = (good.shown, useless.shown)
    more = sum(asked([world.step()], "recycling")[0] for _ in range(100))
    assert (good.shown - before[0], useless.shown - before[1]) == (200, 2 * more)


def test_the_useless_one_of_two_is_left_out() -> None:
    """Beside a good drafter, one that guesses nothing new costs next to nothing: within 2% of the good one alone."""
    results = []
    for rivals in ([], [SimDrafter("recycling", odds=steady(0.02), prior=np.array([0.5]), seconds=0.002)]):
        world = World([SimDrafter("ngram", odds=steady(0.8)), *rivals])
        world.run(60)
        results.append(goodput(world.run(2000)))
    assert results[1] > 0.97 * results[0]


def test_rates_are_per_request_and_step() -> None:
    usage = Usage()
    world = World([SimDrafter("ngram", odds=steady(0.9), seconds=0.0003)], requests=4)
    for step in world.run(50):
        usage.learn(step.stats, 100.0, 0.0)
    gain, seconds = usage.rates()["ngram"]
    assert seconds == pytest.approx(0.0003)
    assert 1.0 < gain < 16.0
    assert not Usage().rates()


def test_dear_slots_leave_room_for_certain_tokens() -> None:
    """A full machine on which a token costs nine tenths of a step still takes drafts that are always right."""
    steps = World([SimDrafter(odds=steady(1.0), prior=np.array([0.9]))], seconds=steep).run(300)
    assert np.mean([s.nodes for s in steps[200:]]) > 1


def test_slots_that_cost_as_much_as_they_bring_are_no_gain() -> None:
    usage = Usage()
    stats = step_stats(draft_seconds={"ngram": 0.001}, gains={"ngram": 1.2}, nodes={"ngram": 4})
    usage.learn(stats, 10.0, 0.25)
    assert usage.rates()["ngram"][0] == pytest.approx(0.2)
    usage.learn(stats, 10.0, 0.5)
    assert usage.rates()["ngram"][0] < 0.2, "and never less than nothing"
