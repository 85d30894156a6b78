"""The automatic length, against simulated acceptance and step times: it gives up what does not pay, and stays awake."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from engine_tools import (
    decoding,
    greedy,
    llm,
    prompt_of,
    reference,
    seconds_at,
    step_stats,
    tree,
)

from paceline.engine.types import DraftBatch, NodeLabel
from paceline.plan.auto import AutoLength
from paceline.plan.base import DrafterLimits
from paceline.plan.step_time import StepTime
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.trim import trim

PRIOR = {"ngram": np.array([0.5, 0.5]), "draft": np.array([0.5, 0.5])}


def flat_then_linear(n: float) -> float:
    """Milliseconds of a forward on a small machine."""
    return 0.010 + 0.001 * n


def simulate(
    policy: AutoLength,
    acceptance: Callable[[int], float],
    num_steps: int,
    *,
    drafter: str = "ngram",
    draft_cost: float = 0.0,
    seconds: Callable[[float], float] = flat_then_linear,
    requests: int = 1,
) -> tuple[list[int], list[int], list[int]]:
    """Steps of chains whose nodes agree with the given odds: verified nodes, drafted depth and labels per step."""
    rng = np.random.default_rng(0)
    verified, depths, labelled = [], [], []
    for step in range(num_steps):
        plan = policy.plan(decoding(requests), 1000)
        depth = min(plan.limits.get(drafter, 0), max(plan.budgets, default=0)) if drafter in plan.drafters else 0
        chain = np.cumprod(np.full(depth, plan.acceptance[""][drafter][0])) if depth else np.empty(0)
        draft = tree([1] * depth, list(range(-1, depth - 1)), survival=chain, drafter=(drafter,) * depth)
        kept = trim(DraftBatch((draft,) * requests), plan) if depth else DraftBatch((draft,) * requests)
        labels: list[NodeLabel] = []
        committed = 0
        for t in kept.trees:
            hits = 0
            for node in range(depth):
                hit = bool(rng.random() < acceptance(step))
                labels.append(NodeLabel(drafter, 0, hit))
                if not hit or node >= len(t):  # beyond the verified nodes one more label, from the bonus token
                    break
                hits += node < len(t)
            committed += hits + 1
        spent = draft_cost * depth
        time = seconds(requests + kept.num_nodes) + spent
        policy.learn(
            step_stats(
                labels,
                num_tokens=requests,
                num_sampling=requests,
                num_draft_nodes=kept.num_nodes,
                num_committed=committed,
                step_seconds=time,
                draft_seconds={drafter: spent},
                draft_depths={drafter: depth},
            )
        )
        verified.append(kept.num_nodes)
        depths.append(depth)
        labelled.append(len(labels))
    return verified, depths, labelled


def auto(*limits: DrafterLimits, seconds: Callable[[float], float] = flat_then_linear) -> AutoLength:
    table = StepTime({n: seconds(n) for n in (1, 2, 4, 8, 16, 32, 64)})
    return AutoLength(limits or (DrafterLimits("ngram", 16, False),), AcceptanceEstimates(PRIOR), table)


def test_useless_drafts_are_given_up_within_fifty_steps_and_still_labelled() -> None:
    policy = auto()
    verified, depths, labelled = simulate(policy, lambda _: 0.0, 100)
    assert verified[0] > 0
    assert verified[50:] == [0] * 50
    assert min(depths[50:]) > 0, "the drafter still proposes"
    assert min(labelled[50:]) > 0, "the estimate is not blind"


def test_they_come_back_when_they_become_good() -> None:
    verified, _, _ = simulate(auto(), lambda step: 0.0 if step < 100 else 0.95, 300)
    assert max(verified[60:100]) == 0
    assert np.mean(verified[250:]) > 4


def test_good_drafts_are_long() -> None:
    verified, _, _ = simulate(auto(), lambda _: 0.97, 120)
    assert np.mean(verified[60:]) >= 10


def test_the_price_rises_with_the_load() -> None:
    """Where every token costs the same time and drafts are half right, many requests leave no room for them."""
    low, _, _ = simulate(auto(), lambda _: 0.6, 150)
    high, _, _ = simulate(auto(), lambda _: 0.6, 150, requests=64)
    assert np.mean(low[100:]) >= 2
    assert np.mean(high[100:]) / 64 < 0.3


def test_a_costly_draft_model_is_dropped_but_probed() -> None:
    policy = auto(DrafterLimits("draft", 8, True))
    _, depths, _ = simulate(policy, lambda _: 0.5, 400, drafter="draft", draft_cost=0.02)
    late = depths[100:]
    assert set(late) == {0, 1}
    assert 2 <= sum(late) <= 8, "one probe in 64 steps"


def test_a_cheap_and_good_draft_model_goes_deep() -> None:
    policy = auto(DrafterLimits("draft", 8, True))
    _, depths, _ = simulate(policy, lambda _: 0.95, 200, drafter="draft", draft_cost=0.0005)
    assert np.mean(depths[100:]) > 6


def test_a_draft_model_that_becomes_good_is_found_by_probing() -> None:
    policy = auto(DrafterLimits("draft", 8, True))
    _, depths, _ = simulate(policy, lambda s: 0.05 if s < 200 else 1.0, 3000, drafter="draft", draft_cost=0.002)
    assert np.mean(depths[100:200]) < 0.2
    assert np.mean(depths[-200:]) > 4


def test_auto_respects_the_room() -> None:
    policy = auto()
    assert policy.plan(decoding(1, max_tokens=3), 1000).budgets == (2,)
    assert policy.plan(decoding(2), 14).budgets == (3, 3)
    assert not policy.plan(decoding(1, max_tokens=1), 1000).looks_ahead
    assert policy.plan(decoding(100), 1000).bucket == 256


def test_a_prefill_chunk_teaches_nothing_about_decoding() -> None:
    policy = auto()
    before = seconds_at(policy._step_time, 4)
    policy.learn(step_stats([], num_tokens=400, num_sampling=1, step_seconds=9.0))
    assert seconds_at(policy._step_time, 4) == before
    assert policy._goodput == {}


@pytest.mark.parametrize("speculation", ["auto", "ngram+recycling:max=8@auto"])
def test_auto_changes_no_text(speculation: str) -> None:
    engine = llm(speculation)
    prompts = [prompt_of(n) for n in (5, 18, 33)]
    for _ in range(2):
        found = engine.generate(prompts, greedy(16))
        assert [g.token_ids for g in found] == [reference(p, 16) for p in prompts]
