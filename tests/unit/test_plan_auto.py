"""Policy `auto`: the price of a slot, against brute force and in simulated runs with known odds and step times.

Runs read no clock and their seeds are fixed, so each of these tests always passes or always fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_tools import decoding, greedy, llm, prompt_of, reference, step_stats
from plan_tools import (
    SimDrafter,
    World,
    batch_in_decode,
    cheap,
    cost_of,
    decoder,
    flat_then_linear,
    goodput,
    mean_nodes,
    steep,
)

from paceline.engine.types import Candidates
from paceline.plan import goodput as goodput_module
from paceline.plan.base import DrafterLimits
from paceline.plan.cost_model import CostModel, CostTable
from paceline.plan.goodput import GoodputLength, PricedCut
from paceline.plan.regret import Regret
from paceline.plan.smartspec_request import RatioCut
from paceline.plan.survival import AcceptanceEstimates

NO_SHARE = 1e9


def fifth(tokens: float) -> float:
    """Seconds of a forward in which every further token costs a fifth of a step."""
    return 0.008 + 0.002 * tokens


def steady(odds: float) -> Callable[..., float]:
    return lambda *_: odds


# The rule, by itself


def candidates(rng: np.random.Generator, requests: int, weights: np.ndarray | None = None) -> Candidates:
    """Chains of random length per request, best first, some with fixed nodes besides."""
    survival, owner = [], []
    for request in range(requests):
        chain = np.cumprod(rng.uniform(0.3, 1.0, int(rng.integers(0, 7))))
        survival += chain.tolist()
        owner += [request] * len(chain)
    s, r = np.array(survival), np.array(owner, dtype=np.int64)
    order = np.argsort(-(s if weights is None else s * weights[r]), kind="stable")
    return Candidates(s[order], r[order], rng.integers(0, 3, requests) * int(rng.integers(0, 2)))


def rising(rng: np.random.Generator, size: int) -> np.ndarray:
    """Times that rise smoothly, in jumps, or not at all for long stretches."""
    return 1.0 + np.cumsum(rng.choice([0.0, 0.01, 0.1, 0.8], size, p=rng.dirichlet(np.ones(4))))


def value(found: Candidates, cut: PricedCut, size: int) -> float:
    """Worth of the first `size` candidates."""
    weights = np.ones(len(found.fixed)) if cut.weights is None else cut.weights
    fixed = min(int(found.fixed.sum()), len(cut.times) - 1)
    gain = sum(found.survival[i] * weights[found.request[i]] for i in range(size))
    return float(gain - cut.goodput * (cut.times[fixed + size] - cut.times[fixed]))


@pytest.mark.parametrize("seed", range(200))
def test_the_size_is_the_best_of_all_prefixes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(1, 6))
    weights = rng.uniform(0.2, 3.0, requests) if rng.random() < 0.5 else None
    found = candidates(rng, requests, weights)
    times = rising(rng, int(rng.integers(1, 40)))
    cut = PricedCut(times, float(rng.uniform(0.1, 6.0)), share=NO_SHARE, weights=weights)
    most = max(0, min(len(found.survival), len(times) - 1 - int(found.fixed.sum())))
    best = max(value(found, cut, n) for n in range(most + 1))
    size = cut.size(found)
    assert 0 <= size <= most
    assert value(found, cut, size) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(200))
def test_weights_lengthen_a_step_by_the_share_at_most(seed: int) -> None:
    """Beyond the step that goodput alone would make: of all sizes within it, the best by worth, or the last."""
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(2, 6))
    weights = rng.uniform(0.2, 3.0, requests)
    found = candidates(rng, requests, weights)
    times = rising(rng, int(rng.integers(8, 40)))
    share, lam = float(rng.choice([0.0, 0.05, 0.1, 0.5])), float(rng.uniform(0.1, 3.0))
    fixed = int(found.fixed.sum())
    order = np.argsort(-found.survival, kind="stable")
    common = PricedCut(times, lam, share=share).size(
        Candidates(found.survival[order], found.request[order], found.fixed)
    )
    size = PricedCut(times, lam, share=share, weights=weights).size(found)
    worth = np.concatenate([[0.0], np.cumsum(found.survival * weights[found.request])])
    most = min(len(found.survival), len(times) - 1 - fixed)
    values = {
        n: worth[n] - lam * (times[fixed + n] - times[fixed])
        for n in range(max(most, 0) + 1)
        if times[min(fixed + n, len(times) - 1)] <= (1.0 + share) * times[min(fixed + common, len(times) - 1)]
    }
    assert size in values
    assert values[size] == pytest.approx(max(values.values()))


@pytest.mark.parametrize("seed", range(300))
def test_nobody_pays_for_the_others(seed: int) -> None:
    """No request's expected rate falls below 1 / (1 + protect) of its plain one, and the size is worth at least as much
    as the largest fair one up to the best without the rule."""
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(1, 6))
    found = candidates(rng, requests)
    times = rising(rng, int(rng.integers(1, 40)))
    protect, lam = float(rng.choice([0.0, 0.05, 0.1, 0.5])), float(rng.uniform(0.1, 3.0))
    fixed = int(found.fixed.sum())

    def fair(size: int) -> bool:
        gains = [found.survival[:size][found.request[:size] == r].sum() for r in range(requests)]
        rates = [(1.0 + gain) / times[fixed + size] for gain in gains]
        return all(rate * (1.0 + protect) >= (1.0 - 1e-12) / times[fixed] for rate in rates)

    wanted = PricedCut(times, lam, share=0.1).size(found)
    size = PricedCut(times, lam, share=0.1, protect=protect).size(found)
    largest = max(n for n in range(wanted + 1) if n == 0 or fair(n))

    def value(n: int) -> float:
        return float(found.survival[:n].sum() - lam * (times[fixed + n] - times[fixed])) if n else 0.0

    assert size <= wanted
    assert size == 0 or fair(size)
    assert value(size) >= min(value(largest), 0.0) - 1e-12
    assert value(size) >= 0.0


def test_protection_in_a_run() -> None:
    """One of two requests has perfect drafts and the other none: unprotected it waits for its neighbour."""

    def step_time(**options: Any) -> float:
        drafter = SimDrafter(odds=lambda _s, _k, request: float(request is world.requests[0]))
        world = World([drafter], requests=2, seconds=lambda n: 0.010 + 0.0006 * n, **options)
        steps = world.run(200)[100:]
        assert all(s.nodes for s in steps)
        return float(np.mean([s.stats.step_seconds for s in steps])) / world.seconds(2)

    assert step_time(protect=0.1) <= 1.13, "a tenth, and what the other's own nodes still promise"
    assert step_time() > 1.3


def test_jumps_of_the_time_are_jumped_over() -> None:
    """Forwards are padded to 8 and 16 tokens: a first node costs as much as seven, and seven are worth it."""
    found = Candidates(np.full(15, 0.5), np.zeros(15, dtype=np.int64), np.zeros(1, dtype=np.int64))
    padded = np.array([1.0] + [2.0] * 7 + [5.0] * 8)
    assert PricedCut(padded, 1.0, share=0.1).size(found) == 15
    assert PricedCut(padded, 1.5, share=0.1).size(found) == 7
    assert PricedCut(padded, 4.0, share=0.1).size(found) == 0
    assert PricedCut(np.array([1.0] + [2.0] * 15), 4.0, share=0.1).size(found) == 15
    assert RatioCut(padded).size(found) == 0, "a rule that stops at the first drop never sees them"


def test_a_prefill_chunk_makes_nodes_neither_cheap_nor_dear() -> None:
    """On a machine where every token costs the same, a chunk of 200 prompt tokens changes nothing about the draft.

    The ratio of the single step would rise with nodes that are hardly ever accepted.
    """
    world = World([SimDrafter(odds=steady(0.5))], cost=cost_of(fifth, adapt=False), seconds=fifth)
    world.run(50)
    found = Candidates(0.5 ** np.arange(1.0, 17.0), np.zeros(16, dtype=np.int64), np.zeros(1, dtype=np.int64))
    kept, ratio = [], []
    for prompt in (0, 200):
        batch = batch_in_decode(world.requests, prompt)
        plan = world.policy.plan(batch, 1 << 30)
        assert plan.cut is not None
        kept.append(plan.cut.size(found))
        ratio.append(RatioCut(world.cost.step_seconds(batch.num_tokens, 16, len(batch.items), 20)).size(found))
    assert kept[0] == kept[1] == 2
    assert ratio[0] <= 2
    assert ratio[1] >= 6, "its last node survives once in 64 times"


def test_the_lengths_of_a_run_do_not_depend_on_prefill() -> None:
    """Every other step carries a chunk of 200 tokens; the nodes kept are those of a run without any."""
    lengths = []
    for prompt in (lambda _step: 0, lambda step: 200 * (step % 2)):
        world = World([SimDrafter(odds=steady(0.8))], seconds=fifth, prompt_tokens=prompt, requests=2)
        world.run(100)
        steps = world.run(200)
        lengths.append([mean_nodes(steps[0::2]), mean_nodes(steps[1::2])])
    assert np.array(lengths) == pytest.approx(np.mean(lengths[0]), rel=0.2)


# Acceptance decides


@pytest.mark.parametrize(("odds", "least", "most"), [(0.1, 0.0, 0.05), (0.5, 1.0, 3.0), (0.8, 3.0, 8.0)])
def test_acceptance_decides_the_length(odds: float, least: float, most: float) -> None:
    """A further token costs a fifth of a step, so it must survive once in five to six times."""
    steps = World([SimDrafter(odds=steady(odds))], seconds=fifth).run(300)[100:]
    assert least <= mean_nodes(steps) <= most


def test_good_drafts_take_all_there_is() -> None:
    steps = World([SimDrafter(odds=steady(0.95))], seconds=cheap).run(150)
    assert {s.nodes for s in steps[50:]} == {16}
    steps = World([SimDrafter(odds=steady(0.98))], seconds=flat_then_linear).run(150)
    assert mean_nodes(steps[50:]) > 14


def test_a_full_machine_gives_up_what_is_not_certain() -> None:
    """Where a token costs nine tenths of a step, even four right guesses in five do not pay."""
    assert mean_nodes(World([SimDrafter(odds=steady(0.8))], seconds=steep).run(150)[50:]) < 0.1


def test_the_price_rises_with_the_load() -> None:
    """One draft, one machine: the more requests share it, the fewer nodes each may have."""
    nodes, prices = [], []
    for requests in (1, 4, 16, 64):
        world = World([SimDrafter(odds=steady(0.7))], seconds=flat_then_linear, requests=requests)
        steps = world.run(120)[60:]
        nodes.append(mean_nodes(steps) / requests)
        prices.append(np.mean([s.kept.slot_price for s in steps]))
    assert nodes == sorted(nodes, reverse=True)
    assert prices == sorted(prices)
    assert nodes[0] > 3 > 0.5 > nodes[-1]


@pytest.mark.parametrize(("odds", "requests"), [(0.2, 1), (0.6, 1), (0.9, 1), (0.2, 12), (0.6, 12), (0.9, 12)])
def test_it_is_never_far_below_the_best_fixed_length(odds: float, requests: int) -> None:
    """The best of six lengths (none among them) is chosen on another seed, so that it is no lucky draw."""
    best: tuple[float, int] = (0.0, 0)
    for k in (0, 1, 2, 4, 8, 16):
        world = World([SimDrafter(odds=steady(odds), most=k)], policy="fixed", requests=requests, seed=1)
        best = max(best, (goodput(world.run(600 // requests + 40)), k))
    rival = goodput(World([SimDrafter(odds=steady(odds), most=best[1])], policy="fixed", requests=requests).run(200))
    world = World([SimDrafter(odds=steady(odds))], requests=requests)
    world.run(50)
    assert goodput(world.run(200)) > 0.94 * rival


# It follows


def test_a_liar_is_found_out_within_fifty_steps() -> None:
    """The drafter's class says 0.98 and is right once in ten times."""
    world = World([SimDrafter(odds=steady(0.1), prior=np.array([0.98]))], seconds=fifth)
    steps = world.run(300)
    assert steps[0].nodes >= 8, "at first it is believed"
    assert mean_nodes(steps[50:]) < 0.1
    assert world.estimates.tables()["ngram"][0] < 0.2
    plain = 1.0 / fifth(1)
    assert goodput(steps[50:]) > 0.98 * plain


def test_a_change_of_topic_is_followed_both_ways() -> None:
    """Right nine times in ten for 200 steps, then once in twenty for 200, then nine in ten again."""
    world = World([SimDrafter(odds=lambda step, *_: 0.05 if 200 <= step < 400 else 0.9)], seconds=fifth)
    steps = world.run(600)
    before = mean_nodes(steps[100:200])
    assert before > 5
    assert mean_nodes(steps[250:400]) < 0.2
    assert mean_nodes(steps[450:600]) > 0.8 * before


def test_confidences_pay_and_shuffled_ones_gain_nothing() -> None:
    """Nodes are right with odds that their class tells; with the classes dealt out at random, the run is no better
    than with one class for all. Goodput scatters by 0.6% between seeds, and 3% are allowed; informed it is 17% better.
    """
    odds = (0.05, 0.4, 0.8, 0.98)

    def run(claims: Callable[[int], int]) -> float:
        drafter = SimDrafter(
            odds=lambda _s, key, _r: odds[key],
            key=lambda rng, _s, _d: int(rng.integers(4)),
            claims=claims,
            prior=np.full(4, 0.5),
        )
        world = World([drafter], seconds=flat_then_linear, requests=8)
        world.run(60)
        return goodput(world.run(400))

    shuffle = np.random.default_rng(5)
    informative, shuffled, single = run(lambda key: key), run(lambda _: int(shuffle.integers(4))), run(lambda _: 0)
    assert informative > 1.1 * single
    assert shuffled < 1.03 * single


def test_it_wakes_up_where_smartspec_sleeps_for_ever() -> None:
    """40 steps without a single hit, then drafts that are nearly always right: SmartSpec as published has stopped
    looking, so it never learns of the change; `auto` looks on in shadow."""
    found = {}
    for policy in ("smartspec", "auto"):
        drafter = SimDrafter(odds=lambda step, *_: 0.0 if step < 40 else 0.95)
        steps = World([drafter], policy=policy, seconds=flat_then_linear).run(600)
        found[policy] = (mean_nodes(steps[20:40]), mean_nodes(steps[90:]))
    assert found["smartspec"] == (0.0, 0.0)
    assert found["auto"][0] < 1.0
    assert found["auto"][1] > 8


# Requests are not alike


def test_slots_go_where_they_are_used() -> None:
    odds = (0.95, 0.1)
    drafter = SimDrafter(odds=lambda _s, _k, request: odds[world.requests.index(request)])
    world = World([drafter], requests=2, seconds=flat_then_linear)
    steps = world.run(200)[100:]
    good, bad = np.mean([s.verified for s in steps], axis=0)
    assert good > 5
    assert bad < 0.6


def test_caps_and_off() -> None:
    """A request's own limits hold in every step, whatever its drafts are worth."""
    requests = [decoder(), decoder(cap=2), decoder(off=True), decoder(cap=0), decoder(max_tokens=60)]
    drafters = [SimDrafter(odds=steady(0.95)), SimDrafter("other", odds=steady(0.95))]
    world = World(drafters, requests=requests, seconds=cheap)
    for _ in range(40):
        room = [r.prompt_len + r.params.max_tokens - len(r.token_ids) - 1 for r in requests]
        if room[4] < 0:
            break
        step = world.step()
        assert step.plan.budgets.tolist()[1:4] == [2, 0, 0]
        assert step.plan.budgets[4] == min(32, max(room[4], 0))
        assert step.verified[1] <= 2
        assert step.verified[2:4] == [0, 0]
        assert int(step.kept.trees[4].depths().max(initial=0)) <= max(room[4], 0)
    assert step.verified[0] > 8


def test_the_heavier_of_two_gets_the_slot() -> None:
    """Both offer a node of the same survival, and the machine has room for one."""
    found = Candidates(np.array([0.5, 0.5]), np.array([1, 0]), np.zeros(2, dtype=np.int64))
    times = np.array([1.0, 1.2, 9.0])
    weights = np.array([0.2, 1.8])
    assert PricedCut(times, 3.0, share=1.0, weights=weights).size(found) == 1, "0.9 pays where 0.5 does not"
    assert PricedCut(times, 3.0, share=0.2, weights=weights).size(found) == 1
    assert PricedCut(times, 3.0, share=0.19, weights=weights).size(found) == 0, "the step would be 20% longer"
    assert PricedCut(times, 3.0, share=1.0).size(found) == 0

    requests = [decoder(), decoder(weight=4.0)]
    steps = World([SimDrafter(odds=steady(0.75))], requests=requests, seconds=fifth, share=10.0).run(200)[50:]
    light, heavy = np.mean([s.verified for s in steps], axis=0)
    assert heavy > light + 2
    even = World([SimDrafter(odds=steady(0.75))], requests=2, seconds=fifth, share=10.0).run(200)[50:]
    one, other = np.mean([s.verified for s in even], axis=0)
    assert abs(one - other) < 1
    assert even[-1].plan.weights is None


def test_a_deadline_makes_a_lagging_request_heavier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests share 2 tokens in 12 ms. One wants 500 tokens within 2 s, which it will miss at that pace; with 20 s
    it would not, and weighs no more than its neighbour."""
    clock = time.perf_counter()
    monkeypatch.setattr(goodput_module, "time", SimpleNamespace(perf_counter=lambda: clock))

    def weights(*requests: object) -> list[float] | None:
        made = World([SimDrafter(odds=steady(0.5))], requests=requests, seconds=fifth)  # type: ignore[arg-type]
        found = made.policy.plan(batch_in_decode(made.requests), 1 << 30).weights
        return None if found is None else found.tolist()

    def wanting(tokens: int, deadline: float, waited: float = 0.0, **wish: Any) -> object:
        request = decoder(tokens, deadline=deadline, **wish)
        request.stats.arrival = clock - waited
        return request

    assert weights(decoder(), wanting(500, 20.0)) is None
    light, heavy = weights(decoder(), wanting(500, 2.0)) or (0.0, 0.0)
    assert heavy / light == pytest.approx(500 / 2.0 / (1 / fifth(2)), rel=0.01)
    assert light + heavy == pytest.approx(2.0), "the mean is one, so that the price keeps its meaning"
    light, heavy = weights(decoder(), wanting(500, 20.0, waited=18.0)) or (0.0, 0.0)
    assert heavy / light == pytest.approx(500 / 2.0 / (1 / fifth(2)), rel=0.01)
    light, late = weights(decoder(), wanting(500, 2.0, waited=9.0)) or (0.0, 0.0)
    assert late / light == pytest.approx(8.0), "one that is late already is not worth everything"
    light, both = weights(decoder(), wanting(500, 2.0, weight=3.0)) or (0.0, 0.0)
    assert both / light == pytest.approx(3.0 * 500 / 2.0 / (1 / fifth(2)), rel=0.01)


# Draft models


def drafting(odds: Callable[..., float], seconds: float, steps: int, **options: object) -> list[int]:
    """Depths that a draft model was asked for."""
    drafter = SimDrafter("draft", odds=odds, cost_per_token=True, seconds=seconds, most=8)
    world = World([drafter], **options)  # type: ignore[arg-type]
    return [s.stats.draft_depths.get("draft", 0) for s in world.run(steps)]


def test_a_costly_draft_model_is_dropped_but_probed() -> None:
    late = drafting(steady(0.5), 0.02, 2500)[100:]
    assert set(late) == {0, 1}
    assert 2 <= sum(late) <= 8, "a look that takes two steps' time comes once in some hundred"


def test_a_cheap_and_good_draft_model_goes_deep() -> None:
    assert np.mean(drafting(steady(0.95), 0.0005, 200)[100:]) > 6


def test_a_draft_model_that_becomes_good_is_found_by_probing() -> None:
    depths = drafting(lambda step, *_: 0.05 if step < 200 else 1.0, 0.002, 3000)
    assert np.mean(depths[100:200]) < 0.2
    assert np.mean(depths[-200:]) > 4


@pytest.mark.parametrize("policy", ["auto", "threshold", "smartspec", "smartspec-request", "fixed"])
def test_a_draft_model_may_be_asked_for_a_hundred_tokens(policy: str) -> None:
    """`draft:max=100`: deeper than any depth that is told apart."""
    drafter = SimDrafter("draft", odds=steady(1.0), cost_per_token=True, seconds=1e-6, most=100)
    steps = World([drafter], policy=policy, seconds=cheap).run(60)
    assert steps[-1].nodes > (8 if policy == "threshold" else 32)


# Plans


def auto(*limits: DrafterLimits) -> GoodputLength:
    prior = {d.name: np.array([0.5, 0.5]) for d in limits}
    return GoodputLength(limits, AcceptanceEstimates(prior), cost_of(flat_then_linear))


def test_it_respects_the_room() -> None:
    policy = auto(DrafterLimits("ngram", 16, False))
    assert policy.plan(decoding(1, max_tokens=3), 1000).budgets.tolist() == [2]
    assert policy.plan(decoding(2), 14).budgets.tolist() == [3, 3]
    assert policy.plan(decoding(100), 1000).bucket == 1024
    assert policy.plan(decoding(3), 1000).bucket == 48


def test_where_nobody_may_look_ahead_no_drafter_spends_time() -> None:
    """Neither on proposing nor on watching."""
    for requests in ([decoder(off=True), decoder(cap=0)], [decoder(max_tokens=1)]):
        drafter = SimDrafter(odds=steady(0.9))
        step = World([drafter], requests=requests).step()
        assert not step.plan.looks_ahead
        assert step.plan.observers == frozenset()
        assert (drafter.budgets, drafter.shown) == ([], 0)
        assert step.stats.draft_seconds == {}


def test_a_step_without_requests_is_planned_and_learned() -> None:
    """A step that only computes prompt chunks."""
    world = World([SimDrafter()])
    plan = world.policy.plan(batch_in_decode([], 64), 1000)
    assert not plan.looks_ahead
    world.policy.learn(step_stats(requests=[decoder()], num_prompt_tokens=500, step_seconds=9.0))


def test_a_prefill_chunk_does_not_spoil_the_goodput() -> None:
    """400 prompt tokens in a step, with the time that they take: a second is worth as much as before."""
    results = []
    for prompt in (0, 400):
        world = World([SimDrafter(odds=steady(0.5))], seconds=fifth, prompt_tokens=lambda _s, p=prompt: p)  # type: ignore[misc]
        world.run(100)
        results.append(world.policy._goodput.at(1, fifth(1)))  # type: ignore[attr-defined]
    assert results[1] == pytest.approx(results[0], rel=0.15)


@pytest.mark.parametrize("speculation", ["auto", "ngram+recycling:max=8@auto", "ngram:k=3+recycling"])
def test_it_changes_no_text(speculation: str) -> None:
    engine = llm(speculation)
    prompts = [prompt_of(n) for n in (5, 18, 33)]
    for _ in range(2):
        found = engine.generate(prompts, greedy(16))
        assert [g.token_ids for g in found] == [reference(p, 16) for p in prompts]


@pytest.mark.parametrize("weights", [None, np.array([1.0, 1.0]), np.array([0.5, 2.0])])
def test_times_that_do_not_ascend_cost_nobody_a_node(weights: np.ndarray | None) -> None:
    """Measured corrections make times uneven; a cap on them never falls below what goodput alone would verify."""
    found = Candidates(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 1, 0, 1]), np.zeros(2, dtype=np.int64))
    times = np.array([1.0, 1.02, 1.5, 1.01, 1.03])
    assert PricedCut(times, 1.0, share=0.1, weights=weights).size(found) == 4
    assert PricedCut(times, 1.0, share=0.1, protect=0.1).size(found) == 4


@pytest.mark.parametrize("policy", ["auto", "threshold", "smartspec", "smartspec-request", "bass", "heuristic"])
def test_a_draft_model_capped_at_zero_is_left_alone(policy: str) -> None:
    drafter = SimDrafter("draft", odds=steady(1.0), cost_per_token=True, seconds=1e-4, most=0)
    steps = World([drafter, SimDrafter("ngram", odds=steady(0.9))], policy=policy).run(30)
    assert sum(s.nodes for s in steps) > 0
    assert not any("draft" in s.stats.draft_seconds for s in steps)


def test_the_slot_price_is_one_when_nothing_pays() -> None:
    steps = World([SimDrafter(odds=steady(0.0), seconds=0.001)]).run(100)
    unasked = [s for s in steps[50:] if "ngram" not in s.stats.draft_seconds]
    assert unasked
    assert all(s.stats.slot_price == 1.0 for s in unasked)


def overlapping(live: float, gain: int, steps: int = 3000) -> tuple[int, float]:
    """Steps in which the drafter was asked, and tokens over those of plain steps alone, where plain steps take 10 ms
    and those with drafts `live`."""
    table = CostTable(tokens=(1, 8, 64), seconds=(0.01, 0.01, 0.011))
    estimates = AcceptanceEstimates({"ngram": np.full(4, 0.5)})
    limits = [DrafterLimits("ngram", 4, cost_per_token=False)]
    policy = GoodputLength(limits, estimates, CostModel(table, overlaps=True))
    batch = decoding(max_tokens=100_000)
    requests = (batch.items[0].request,)
    asked, passed, tokens = 0, 0.0, 0
    for _ in range(steps):
        if policy.plan(batch, 1 << 30).looks_ahead:
            asked += 1
            passed, tokens = passed + live, tokens + 1 + gain
            stats = step_stats(
                requests=requests,
                step_seconds=live,
                draft_seconds={"ngram": 1e-5},
                draft_depths={"ngram": 4},
                gains={"ngram": 3.0},
                nodes={"ngram": 4},
                verified=np.array([4]),
                committed=np.array([1 + gain]),
            )
        else:
            passed, tokens = passed + 0.01, tokens + 1
            stats = step_stats(requests=requests, step_seconds=0.01)
        policy.learn(stats)
    return asked, tokens * 0.01 / passed


def test_what_looking_may_lose_is_bounded_by_the_clock() -> None:
    """Whatever drafters are believed to bring: here three tokens, and none comes."""
    asked, ratio = overlapping(live=0.03, gain=0)
    assert 0 < asked < 60
    assert ratio > 0.97


def test_looking_goes_on_where_it_wins_by_the_clock() -> None:
    asked, ratio = overlapping(live=0.012, gain=1)
    assert asked > 2500
    assert ratio > 1.5


def test_few_plain_steps_are_taken_all_the_same() -> None:
    """A new number of requests begins with them, and then one comes in every 64."""
    asked, _ = overlapping(live=0.012, gain=1, steps=640)
    assert 610 <= asked <= 640 - 6 - 8


def test_a_draft_that_takes_very_long_is_rested_from_very_long() -> None:
    """What a drafter takes by itself is no disturbance."""
    regret = Regret()
    for step in range(10):
        regret.learn(step_stats(step_seconds=0.01), step)
    assert regret.seconds(1) == pytest.approx(0.01)
    regret.learn(step_stats(step_seconds=0.5, draft_seconds={"magicdec": 0.49}), 10)
    assert all(regret.is_due(1, step) for step in range(11, 2000, 100))


def test_a_disturbance_is_not_what_looking_costs() -> None:
    regret = Regret()
    for step in range(10):
        regret.learn(step_stats(step_seconds=0.01), step)
    regret.learn(step_stats(step_seconds=5.0, draft_seconds={"ngram": 1e-4}), 10)
    assert not regret.is_due(1, 11)
