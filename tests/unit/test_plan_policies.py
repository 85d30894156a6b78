"""The published length policies against their papers' numbers, by themselves and in simulated runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from engine_tools import decoding, step_stats
from fakes import head_options
from plan_tools import SimDrafter, World, cheap, cost_of, decoder, flat_then_linear, limits_of, mean_nodes, steep

from paceline.engine.types import Candidates
from paceline.plan.base import DrafterLimits
from paceline.plan.bass import BassLength
from paceline.plan.goodput import PricedCut
from paceline.plan.heuristic import HeuristicLength
from paceline.plan.registry import POLICIES, create_policy
from paceline.plan.smartspec import SmartSpec
from paceline.plan.smartspec_request import RatioCut
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.threshold import FloorCut

NGRAM = [DrafterLimits("ngram", 64, False)]


def steady(odds: float) -> Callable[..., float]:
    return lambda *_: odds


def estimates() -> AcceptanceEstimates:
    return AcceptanceEstimates({"ngram": np.array([0.5])})


def chain_survival(odds: float, length: int) -> Candidates:
    return Candidates(odds ** np.arange(1.0, length + 1), np.zeros(length, dtype=np.int64), np.zeros(1, dtype=np.int64))


# All of them


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs_beside_requests_that_come_go_and_hold_back(name: str) -> None:
    """Caps, `off`, other tenants, requests that end, prefill chunks: 60 steps without a plan that breaks a rule."""
    requests = [decoder(), decoder(cap=1), decoder(off=True), decoder(salt="b"), decoder(max_tokens=40)]
    drafters = [SimDrafter("ngram", odds=steady(0.7), most=6), SimDrafter("recycling", odds=steady(0.3), most=5)]
    world = World(drafters, policy=name, requests=requests, prompt_tokens=lambda step: 30 * (step % 3 == 0))
    looked = 0
    for n in range(60):
        if n == 30:
            gone = world.requests.pop(0)
            world.policy.forget(gone)
            world.requests.insert(0, decoder(salt="c"))
        if world.requests[-1].num_output >= 39:
            world.requests[-1] = decoder(max_tokens=40)
        step = world.step()
        plan = step.plan
        looked += plan.looks_ahead
        if not plan.looks_ahead:
            continue
        assert len(plan.budgets) == 5
        assert set(plan.limits) == set(plan.acceptance) == set(plan.drafters)
        assert all(max(limits_of(plan, name)) <= 6 for name in plan.drafters)
        assert all(chances.shape == (5, 1) for chances in plan.acceptance.values())
        assert all(0 < chance.min() <= chance.max() < 1 for chance in plan.acceptance.values())
        assert step.nodes <= plan.bucket
        assert step.verified[1] <= 2
        assert step.verified[2] == 0
        assert int(step.kept.trees[1].depths().max(initial=0)) <= 1
    assert looked > 10


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_is_asked_where_there_is_no_room(name: str) -> None:
    policy = create_policy(name, head_options(name), NGRAM, estimates(), lambda: cost_of(flat_then_linear))
    assert not policy.plan(decoding(2, max_tokens=1), 1000).looks_ahead
    assert not policy.plan(decoding(2), 10).looks_ahead
    assert not policy.plan(decoding(0), 1000).looks_ahead


@pytest.mark.parametrize("name", POLICIES)
def test_a_drafter_of_no_length_is_never_asked(name: str) -> None:
    """`ngram:max=0`."""
    drafter = SimDrafter(odds=steady(0.9), most=0)
    assert all(s.nodes == 0 for s in World([drafter], policy=name).run(30))
    assert sum(drafter.budgets) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_the_cost_model_is_made_only_where_it_is_needed(name: str) -> None:
    made = []
    cost = lambda: made.append(1) or cost_of(cheap)  # type: ignore[func-returns-value]  # noqa: E731
    create_policy(name, head_options(name), NGRAM, estimates(), cost)
    assert bool(made) == POLICIES[name].priced == (name in ("auto", "sequoia", "smartspec", "smartspec-request"))


# BASS


def test_the_papers_trace_of_bass() -> None:
    policy = BassLength(NGRAM, estimates())
    assert policy.length == 7
    trace = []
    for longest in (7, 9, 3, 3, 3):
        policy.update([1, longest, 0])
        trace.append(policy.length)
    assert trace == [9, 11, 9, 7, 5]


def test_bass_stays_between_its_bounds() -> None:
    policy = BassLength(NGRAM, estimates())
    for _ in range(40):
        policy.update([policy.length])
    assert policy.length == 32
    policy.update([31])
    assert policy.length == 31, "not below the longest acceptance: 32 - 4 would be"
    for _ in range(40):
        policy.update([0, 0])
    assert policy.length == 1
    policy.update([1])
    assert policy.length == 3


def test_bass_in_a_run() -> None:
    """It reads the longest acceptance of the batch from the step's statistics, and the plan follows."""
    drafter = SimDrafter(odds=lambda step, *_: 1.0 if step < 8 else 0.0, most=64)
    steps = World([drafter], policy="bass", requests=3).run(30)
    lengths = [limits_of(s.plan, "ngram") for s in steps]
    assert [row[0] for row in lengths[:9]] == [7, 9, 11, 13, 15, 17, 19, 21, 23]
    assert [row[0] for row in lengths[9:13]] == [20, 17, 14, 11], "-3, and one more in a row"
    assert lengths[-1] == [1, 1, 1]


# The heuristic of transformers


def test_the_heuristic_grows_by_two_and_shrinks_by_one() -> None:
    policy = HeuristicLength(NGRAM, estimates())
    batch = decoding(3)
    requests = [item.request for item in batch.sampling]

    def lengths() -> list[int]:
        return limits_of(policy.plan(batch, 1000), "ngram")

    def learn(committed: list[int], verified: list[int]) -> None:
        policy.learn(step_stats(requests=requests, committed=np.array(committed), verified=np.array(verified)))

    assert lengths() == [5, 5, 5]
    learn([6, 5, 1], [5, 5, 0])
    assert lengths() == [7, 4, 5], "all accepted, one missed, nothing drafted"
    learn([3, 1, 4], [2, 4, 3])
    assert lengths() == [9, 3, 7], "a draft shorter than asked counts as well"
    for _ in range(9):
        learn([1, 1, 99], [5, 5, 98])
    assert lengths() == [1, 1, 25]
    policy.forget(requests[2])
    assert lengths() == [1, 1, 5]


def test_the_heuristic_stays_below_the_cap() -> None:
    steps = World([SimDrafter(odds=steady(1.0), most=12)], policy="heuristic").run(30)
    assert steps[-1].nodes == 12


# A threshold


def test_the_threshold_keeps_what_reaches_it() -> None:
    assert FloorCut(0.25).size(chain_survival(0.5, 8)) == 2
    assert FloorCut(0.26).size(chain_survival(0.5, 8)) == 1
    assert FloorCut(0.0).size(chain_survival(0.5, 8)) == 8
    assert FloorCut(0.6).size(chain_survival(0.5, 8)) == 0


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_the_threshold_in_a_run(p: float) -> None:
    """Every kept node reaches it, every dropped one does not, and the load does not matter."""
    lengths = []
    for seconds in (cheap, steep):
        steps = World([SimDrafter(odds=steady(0.8))], policy="threshold", p=p, seconds=seconds, requests=2).run(120)
        for step in steps:
            for whole, kept in zip(step.drafted.trees, step.kept.trees, strict=True):
                assert (whole.survival >= p).sum() == len(kept)
        lengths.append(mean_nodes(steps[40:]) / 2)
    assert lengths[0] == lengths[1]
    assert lengths[0] == pytest.approx(np.log(p) / np.log(0.8), abs=1.2)


def test_a_draft_model_drafts_to_the_threshold_and_keeps_one_token() -> None:
    good = SimDrafter("draft", odds=steady(0.9), cost_per_token=True, most=20)
    steps = World([good], policy="threshold", p=0.3).run(250)
    depths = [limits_of(s.plan, "draft")[0] for s in steps[150:]]
    assert 5 < np.mean(depths) < 14, "0.9 ** 11 is 0.31"
    bad = SimDrafter("draft", odds=steady(0.0), cost_per_token=True, most=20)
    steps = World([bad], policy="threshold", p=0.3).run(250)
    assert limits_of(steps[-1].plan, "draft") == [1], "or it would never see again whether it became better"
    assert steps[-1].nodes == 0


# SmartSpec


def smartspec(odds: float, seconds: Callable[[float], float] = flat_then_linear, steps: int = 200) -> list[int]:
    """The global k of every step at batch 1."""
    found = World([SimDrafter(odds=steady(odds), most=8)], policy="smartspec", seconds=seconds).run(steps)
    return [max(limits_of(s.plan, "ngram"), default=0) for s in found]


def test_smartspec_at_its_ends() -> None:
    """The notes' control: acceptance 0.1 forces k = 0, 0.95 forces the most at batch 1 on a machine with room."""
    assert smartspec(0.1)[-100:] == [0] * 100
    assert smartspec(0.95, cheap)[-100:] == [8] * 100


def test_smartspec_decides_every_twenty_steps() -> None:
    lengths = smartspec(0.6, steps=400)
    changes = [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    assert changes
    assert all(i % 20 == 0 for i in changes)


def by_hand(rate: float, seconds: Callable[[float], float], requests: int, most: int) -> int:
    """The search as published, with 1.1 for k = 0."""
    best, best_goodput = 0, 1.1 * requests / seconds(requests)
    for k in range(1, most + 1):
        goodput = requests * (1 - rate ** (k + 1)) / (1 - rate) / seconds(requests * (k + 1))
        if goodput < best_goodput:
            return best
        best, best_goodput = k, goodput
    return best


@pytest.mark.parametrize("requests", [1, 4, 16])
def test_smartspec_starts_at_a_rate_of_seven_in_ten(requests: int) -> None:
    policy = SmartSpec([DrafterLimits("ngram", 8, False)], estimates(), cost_of(flat_then_linear))
    plan = policy.plan(decoding(requests), 1000)
    expected = by_hand(0.7, flat_then_linear, requests, 8)
    assert max(limits_of(plan, "ngram"), default=0) == expected


def test_smartspec_averages_the_rate_of_the_batch() -> None:
    policy = SmartSpec(NGRAM, estimates(), cost_of(flat_then_linear))
    requests = [decoder(), decoder()]
    policy.learn(step_stats(requests=requests, committed=np.array([3, 1]), verified=np.array([4, 4])))
    assert policy._rate == pytest.approx(0.85 * 0.7 + 0.15 * 2 / 8)
    policy.learn(step_stats(requests=requests, committed=np.array([1, 1])))
    assert policy._rate == pytest.approx(0.85 * 0.7 + 0.15 * 2 / 8), "a step without drafts says nothing"


def test_smartspec_stops_at_the_first_drop() -> None:
    """A second token costs three forwards, and then eight are free: it never gets that far."""

    def jumps(tokens: float) -> float:
        return 0.010 if tokens <= 1 else 0.030

    policy = SmartSpec([DrafterLimits("ngram", 8, False)], estimates(), cost_of(jumps))
    policy._rate = 0.98
    assert policy.plan(decoding(1), 1000).looks_ahead is False
    assert PricedCut(np.array([0.010] + [0.030] * 8), 100.0, share=0.1).size(chain_survival(0.98, 8)) == 8


def test_smartspec_counts_the_draft_models_time() -> None:
    ks = []
    for seconds in (0.0001, 0.02):
        draft = SimDrafter("draft", odds=steady(0.95), cost_per_token=True, seconds=seconds, most=8)
        steps = World([draft], policy="smartspec", seconds=cheap).run(60)
        ks.append(max(limits_of(steps[-1].plan, "draft"), default=0))
    assert ks == [8, 0]


# SmartSpec per request


@pytest.mark.parametrize("seed", range(50))
def test_the_ratio_rule_grows_until_its_first_drop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(1, 5))
    survival = np.sort(rng.random(int(rng.integers(0, 20))))[::-1]
    owner = rng.integers(0, requests, len(survival))
    fixed = rng.integers(0, 2, requests)
    times = 1.0 + np.cumsum(rng.uniform(0.0, 0.3, int(rng.integers(4, 30))))
    start = min(int(fixed.sum()), len(times) - 1)
    size, tokens = 0, float(requests)
    while size < len(survival) and start + size + 1 < len(times):
        grown = tokens + survival[size]
        if grown / times[start + size + 1] < tokens / times[start + size]:
            break
        size, tokens = size + 1, grown
    assert RatioCut(times).size(Candidates(survival, owner, fixed)) == size


def test_smartspec_per_request_tells_requests_apart() -> None:
    odds = (0.95, 0.05)
    drafter = SimDrafter(odds=lambda _s, _k, request: odds[world.requests.index(request)])
    world = World([drafter], policy="smartspec-request", requests=2)
    good, bad = np.mean([s.verified for s in world.run(150)[75:]], axis=0)
    assert good > bad + 4
