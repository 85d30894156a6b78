"""The plan: how far to look ahead, from measured times and moving acceptance, and which nodes are worth verifying."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from engine_tools import (
    batch_of,
    decoding,
    greedy,
    make_request,
    seconds_at,
    step_stats,
    tree,
)

from paceline.engine.draft_tree import DraftTree
from paceline.engine.types import DraftBatch, NodeLabel, SpecPlan, StepPrice
from paceline.plan.base import DrafterLimits, room
from paceline.plan.fixed import FixedLength
from paceline.plan.step_time import StepTime
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.trim import trim

PRIOR = {"ngram": np.array([0.5, 0.5]), "draft": np.array([0.5, 0.5])}


# Room and fixed lengths


def test_room_respects_max_tokens_and_the_context() -> None:
    short, long, full = (make_request(range(10), greedy(n)) for n in (4, 100, 1))
    short.token_ids += [1]
    batch = batch_of(short, long, full)
    assert room(batch, 1000, 20) == (4 - 1 - 1, 20, 0)
    assert room(batch, 14, 20) == (2, 3, 0)
    assert room(batch, 11, 20) == (0, 0, 0)


def test_fixed_is_the_same_every_step() -> None:
    limits = [DrafterLimits("ngram", 4, False), DrafterLimits("draft", 3, True)]
    policy = FixedLength(limits, AcceptanceEstimates(PRIOR))
    for _ in range(3):
        plan = policy.plan(decoding(3), 1000)
        assert plan.budgets == (7, 7, 7)
        assert (plan.bucket, plan.price) == (21, None)
        assert plan.drafters == ("ngram", "draft")
        assert plan.limits == {"ngram": 4, "draft": 3}
        policy.learn(step_stats([NodeLabel("ngram", 0, False)] * 50))
    assert plan.acceptance[""]["ngram"][0] < 0.1
    assert not policy.plan(decoding(2, max_tokens=1), 1000).looks_ahead


# Trimming


def closed_subsets(draft: DraftTree) -> list[tuple[int, ...]]:
    """All ancestor-closed node sets."""
    mask = draft.ancestor_mask()
    found = []
    for r in range(len(draft) + 1):
        for nodes in itertools.combinations(range(len(draft)), r):
            if all(set(np.flatnonzero(mask[n])) <= set(nodes) for n in nodes):
                found.append(nodes)
    return found


def random_tree(rng: np.random.Generator, size: int) -> DraftTree:
    parents = [int(rng.integers(-1, i)) for i in range(size)]
    survival = np.empty(size)
    for i, parent in enumerate(parents):
        survival[i] = rng.uniform(0.2, 1.0) * (1.0 if parent < 0 else survival[parent])
    return tree(rng.integers(0, 90, size).tolist(), parents, survival=survival)


def plan_with(times: np.ndarray, goodput: float, bucket: int, requests: int = 1) -> SpecPlan:
    return SpecPlan((bucket,) * requests, ("ngram",), bucket, PRIOR, {}, StepPrice(times, goodput))


def steps(rng: np.random.Generator, bucket: int) -> np.ndarray:
    """A time table with tiles: flat, then a jump."""
    return 1.0 + np.cumsum(np.where(np.arange(bucket + 1) % 3 == 1, rng.uniform(0.0, 2.0, bucket + 1), 0.01))


@pytest.mark.parametrize("seed", range(30))
def test_trim_equals_brute_force(seed: int) -> None:
    """Over all ancestor-closed subsets of two requests' trees, with a step-shaped time table."""
    rng = np.random.default_rng(seed)
    drafts = DraftBatch((random_tree(rng, 6), random_tree(rng, 5)), {"ngram": 0.1})
    bucket = int(rng.integers(3, 12))
    plan = plan_with(steps(rng, bucket), float(rng.uniform(0.1, 1.5)), bucket, 2)
    assert plan.price is not None

    def value(nodes: tuple[tuple[int, ...], ...]) -> float:
        gain = sum(t.survival[list(n)].sum() for t, n in zip(drafts.trees, nodes, strict=True))
        count = sum(len(n) for n in nodes)
        return float(gain - plan.price.goodput * (plan.price.times[count] - plan.price.times[0]))

    pairs = itertools.product(*(closed_subsets(t) for t in drafts.trees))
    best = max(value(pair) for pair in pairs if sum(map(len, pair)) <= bucket)
    kept = trim(drafts, plan)
    assert kept.seconds == drafts.seconds
    found = tuple(
        tuple(np.flatnonzero(np.isin(whole.survival, cut.survival)).tolist())
        for whole, cut in zip(drafts.trees, kept.trees, strict=True)
    )
    assert all(nodes in closed_subsets(t) for nodes, t in zip(found, drafts.trees, strict=True))
    assert value(found) == pytest.approx(best)


def test_trim_never_stops_at_a_first_drop() -> None:
    """The first node does not pay for the jump; all eight together do."""
    draft = tree(list(range(8)), list(range(-1, 7)), survival=np.full(8, 0.9))
    times = np.array([1.0] + [3.0] * 8)
    assert trim(DraftBatch((draft,)), plan_with(times, 1.0, 8)).num_nodes == 8
    assert trim(DraftBatch((draft,)), plan_with(times, 3.7, 8)).num_nodes == 0


def test_trim_to_a_bucket_without_a_price() -> None:
    first = tree([1, 2], [-1, 0], survival=np.array([0.9, 0.5]))
    second = tree([3, 4], [-1, 0], survival=np.array([0.8, 0.7]))
    drafts = DraftBatch((first, second))
    kept = trim(drafts, SpecPlan((2, 2), ("ngram",), 3, PRIOR))
    assert [t.tokens.tolist() for t in kept.trees] == [[1], [3, 4]]
    assert trim(drafts, SpecPlan((2, 2), ("ngram",), 4, PRIOR)) is drafts


def test_sampled_trees_are_kept_whole() -> None:
    """They take their share of the time table first; the others get what still pays."""
    sampled = tree([1, 2, 3], [-1, 0, 1], survival=np.array([0.1, 0.01, 0.001]), sampled=True)
    chosen = tree([4, 5], [-1, 0], survival=np.array([0.9, 0.5]))
    times = np.array([1.0, 1.5, 2.0, 2.5, 3.3, 4.1])  # a fourth and fifth node cost 0.8 each
    kept = trim(DraftBatch((sampled, chosen)), plan_with(times, 1.0, 5, 2))
    assert [len(t) for t in kept.trees] == [3, 1]
    kept = trim(DraftBatch((sampled, chosen)), plan_with(times, 1.5, 5, 2))  # 0.5 * 1.5 would still pay
    assert [len(t) for t in kept.trees] == [3, 0]
    only = DraftBatch((sampled,))
    assert trim(only, plan_with(times[:2], 9.0, 1)).trees == (sampled,)


# Estimates


def test_estimates_follow_a_change_within_fifty_labels() -> None:
    estimates = AcceptanceEstimates(PRIOR)
    estimates.learn([NodeLabel("ngram", 1, True)] * 500)
    assert estimates.tables()["ngram"][1] > 0.95
    estimates.learn([NodeLabel("ngram", 1, False)] * 50)
    assert estimates.tables()["ngram"][1] < 0.4
    estimates.learn([NodeLabel("ngram", 1, False)] * 50)
    assert estimates.tables()["ngram"][1] < 0.2
    assert estimates.tables()["ngram"][0] == estimates.tables()["draft"][0] == 0.5, "the others are untouched"
    assert estimates.tables("another tenant")["ngram"][1] == 0.5, "tenants share nothing"


def test_estimates_start_from_the_prior() -> None:
    estimates = AcceptanceEstimates({"ngram": np.array([0.2, 0.8])})
    assert estimates.tables()["ngram"].tolist() == [0.2, 0.8]
    assert estimates.rate("ngram") == pytest.approx(0.5)
    estimates.learn([NodeLabel("ngram", 1, True)] * 4)
    low, high = estimates.tables()["ngram"]
    assert low == 0.2
    assert 0.85 < high < 0.95
    assert estimates.rate("ngram") == pytest.approx(high, abs=0.01), "weighted by how often a class occurs"


def test_estimates_converge_to_the_rate() -> None:
    rng = np.random.default_rng(0)
    estimates = AcceptanceEstimates(PRIOR)
    seen = []
    for hit in rng.random(3000) < 0.7:
        estimates.learn([NodeLabel("draft", 0, bool(hit))])
        seen.append(estimates.tables()["draft"][0])
    assert np.mean(seen[200:]) == pytest.approx(0.7, abs=0.03)


# Step times


def test_step_time_interpolates_and_extends() -> None:
    table = StepTime({1: 1.0, 4: 4.0, 8: 4.0, 16: 8.0})
    assert [seconds_at(table, n) for n in (1, 2, 4, 6, 8, 12, 16)] == pytest.approx([1, 2, 4, 4, 4, 6, 8])
    assert seconds_at(table, 24) == pytest.approx(12.0)


@pytest.mark.parametrize("sizes", [{1: 1.0, 2: 2.0}, {1: 1.0, 2: 1.5, 3: 2.5}])
def test_step_time_of_few_sizes(sizes: dict[int, float]) -> None:
    """A model with a tiny context is measured at two sizes only."""
    table = StepTime(sizes)
    assert np.isfinite(seconds_at(table, 10))
    assert seconds_at(table, 10) > seconds_at(table, 3)


def test_step_time_shifts_per_number_of_requests() -> None:
    table = StepTime({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0})
    for _ in range(60):
        table.learn(4, 2, 5.0)
    assert seconds_at(table, 4, 2) == pytest.approx(5.0, abs=0.01)
    assert seconds_at(table, 8, 2) == pytest.approx(9.0, abs=0.01), "a shift keeps the differences between sizes"
    assert seconds_at(table, 4, 1) == 4.0


def test_step_time_clips_outliers() -> None:
    table = StepTime({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0})
    table.learn(4, 1, 4.0)
    table.learn(4, 1, 1000.0)  # the machine paused
    assert seconds_at(table, 4) <= 4.0 + 0.1 * 2.0 + 1e-9
    table.learn(4, 1, 0.0)
    assert seconds_at(table, 4) >= 3.9
