"""Acceptance estimates: prior, memory, requests' own numbers, tenants, depth. Random tests state their odds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from engine_tools import labels_of, step_stats
from numpy.typing import ArrayLike
from plan_tools import SimDrafter, World, decoder

from paceline.engine.request import Request
from paceline.engine.types import NodeLabels
from paceline.plan.evidence import MEMORIES, Evidence, Labels, offsets
from paceline.plan.survival import AcceptanceEstimates

PRIOR = {"ngram": np.array([0.5, 0.5]), "draft": np.array([0.5, 0.5])}


def tell(estimates: AcceptanceEstimates, labels: NodeLabels, *requests: Request) -> None:
    """A step of requests that were planned for."""
    estimates.requests.batch(requests, 1 << 30)
    estimates.learn(step_stats(labels, requests=requests))


def learn(estimates: AcceptanceEstimates, *rows: tuple[str, int, bool], steps: int = 1, salt: str = "") -> None:
    """Steps of requests that have one step each, so that only classes learn."""
    for _ in range(steps):
        request = decoder(salt=salt)
        tell(estimates, labels_of(*rows), request)
        estimates.forget(request)


def many(hits: ArrayLike, requests: Sequence[int], predicted: ArrayLike) -> NodeLabels:
    """Labels of one class and depth."""
    ones = np.ones(len(requests), dtype=np.int64)
    return NodeLabels(("ngram",), 0 * ones, 0 * ones, ones, np.array(requests), np.array(predicted), np.array(hits))


def rows_of(estimates: AcceptanceEstimates, requests: Sequence[Request]) -> np.ndarray:
    """Their rows, as a plan would ask for them."""
    return estimates.requests.batch(tuple(requests), 1 << 30).rows


def of(estimates: AcceptanceEstimates, requests: Sequence[Request]) -> np.ndarray:
    """Estimates of class 0 of the n-gram drafter.  # [len(requests)]"""
    return estimates.of_batch(requests, rows_of(estimates, requests), ["ngram"])["ngram"][:, 0]


def test_they_start_from_the_prior_and_join_it_with_what_is_seen() -> None:
    estimates = AcceptanceEstimates({"ngram": np.array([0.2, 0.8]), "draft": np.array([0.5])})
    assert estimates.tables()["ngram"] == pytest.approx([0.2, 0.8])
    learn(estimates, ("ngram", 1, True), steps=4)
    low, high = estimates.tables()["ngram"]
    assert low == pytest.approx(0.2)
    assert 0.85 < high < 0.95
    assert estimates.tables()["draft"] == pytest.approx([0.5])


def test_a_wrong_prior_is_corrected_within_dozens_of_steps() -> None:
    for prior, truth in ((0.98, False), (0.02, True)):
        estimates = AcceptanceEstimates({"ngram": np.array([prior])})
        learn(estimates, ("ngram", 0, truth), steps=30)
        assert abs(estimates.tables()["ngram"][0] - truth) < 0.17


def test_a_change_shows_within_fifty_steps() -> None:
    estimates = AcceptanceEstimates(PRIOR)
    learn(estimates, ("ngram", 1, True), steps=500)
    assert estimates.tables()["ngram"][1] > 0.95
    learn(estimates, ("ngram", 1, False), steps=50)
    assert estimates.tables()["ngram"][1] < 0.45
    learn(estimates, ("ngram", 1, False), steps=50)
    assert estimates.tables()["ngram"][1] < 0.2
    assert estimates.tables()["ngram"][0] == pytest.approx(0.5), "the others are untouched"
    assert estimates.tables()["draft"] == pytest.approx([0.5, 0.5])


def test_only_what_gets_new_evidence_fades() -> None:
    estimates = AcceptanceEstimates(PRIOR)
    learn(estimates, ("ngram", 0, True), ("ngram", 1, False), steps=100)
    before = estimates.tables()["ngram"][0]
    learn(estimates, ("ngram", 1, False), steps=1000)
    assert estimates.tables()["ngram"][0] == before


def test_they_converge_to_the_rate() -> None:
    """3000 draws at 0.7: the mean of the estimate is within 0.03 of it (its deviation is 0.008, so odds below 1e-3;
    the seed is fixed)."""
    rng = np.random.default_rng(0)
    estimates = AcceptanceEstimates(PRIOR)
    seen = []
    for hit in rng.random(3000) < 0.7:
        learn(estimates, ("draft", 0, bool(hit)))
        seen.append(estimates.tables()["draft"][0])
    assert np.mean(seen[200:]) == pytest.approx(0.7, abs=0.03)


def test_a_busy_batch_makes_them_sharper_not_shorter_lived() -> None:
    """Sixteen labels a step instead of one: a quarter of the scatter, and a change is followed no faster."""
    scatter, followed = [], []
    for labels in (1, 16):
        rng = np.random.default_rng(labels)
        estimates = AcceptanceEstimates({"ngram": np.array([0.5])})
        requests = [decoder() for _ in range(labels)]
        seen = []
        for _ in range(1500):
            hits = rng.random(labels) < 0.5
            tell(estimates, many(hits, range(labels), [0.5] * labels), *requests)
            seen.append(estimates.tables()["ngram"][0])
        scatter.append(np.std(seen[100:]))
        for _ in range(35):
            tell(estimates, many([True] * labels, range(labels), [0.5] * labels), *requests)
        followed.append(estimates.tables()["ngram"][0])
    assert scatter[1] < 0.4 * scatter[0]
    assert followed == pytest.approx([0.75, 0.75], abs=0.06), "half way in 35 steps, however many labels"


# Requests


def test_a_request_differs_from_its_kind_alone() -> None:
    """Two requests of one tenant: what only one of them gets wrong is its own, and it shows in dozens of steps."""
    estimates = AcceptanceEstimates({"ngram": np.array([0.7])})
    good, bad, idle = (decoder() for _ in range(3))
    rng = np.random.default_rng(0)
    for _ in range(40):
        predicted = of(estimates, [good, bad])
        labels = many(rng.random(2) < (0.95, 0.15), [0, 1], predicted)
        estimates.learn(step_stats(labels, requests=[good, bad]))
    high, low, neutral = of(estimates, [good, bad, idle])
    assert high > 0.8
    assert low < 0.35
    assert neutral == pytest.approx(estimates.tables()["ngram"][0]), "one without labels is typical"
    assert of(estimates, [decoder()])[0] == pytest.approx(neutral), "and so is a new one"


def test_labels_move_the_request_and_drafter_they_belong_to() -> None:
    estimates = AcceptanceEstimates(PRIOR)
    requests = [decoder() for _ in range(3)]
    rows = rows_of(estimates, requests)
    before = dict(estimates.of_batch(requests, rows, PRIOR))
    estimates.learn(step_stats(labels_of(("draft", 1, True), request=1), requests=requests))
    after = estimates.of_batch(requests, rows, PRIOR)
    own = {name: after[name] / (1 - after[name]) / (before[name] / (1 - before[name])) for name in PRIOR}
    assert (own["ngram"] == 1.0).all(), "another drafter's classes stay"
    assert own["draft"][[0, 2], 0] == pytest.approx(1.0), "others' unseen class stays"
    assert own["draft"][[0, 2], 1] == pytest.approx(own["draft"][0, 1]), "the class moved for all alike"
    assert own["draft"][1, 0] > 1.1, "the request moved in all classes of the drafter"


def test_forget_frees_and_a_stranger_does_not_inherit() -> None:
    estimates = AcceptanceEstimates({"ngram": np.array([0.5])})
    for _ in range(200):
        request = decoder()
        assert of(estimates, [request])[0] == pytest.approx(estimates.tables()["ngram"][0])
        estimates.learn(step_stats(labels_of(("ngram", 0, False), predicted=0.9), requests=[request]))
        estimates.forget(request)
        before = estimates.tables()["ngram"].tolist()
        estimates.learn(step_stats(labels_of(("ngram", 0, True), predicted=0.1), requests=[request]))
        assert estimates.tables()["ngram"].tolist() == before, "it is gone already, and so are its labels"
    assert len(estimates.requests.records) == 64


def test_numbers_of_more_than_64_requests() -> None:
    """The table grows in the middle of a run; afterwards every request has its own number still."""
    estimates = AcceptanceEstimates({"ngram": np.array([0.5])})
    early = [decoder() for _ in range(60)]
    hits = np.arange(60) % 2 == 0
    for _ in range(30):
        estimates.learn(step_stats(many(hits, range(60), of(estimates, early)), requests=early))
    found = of(estimates, early)
    late = of(estimates, [decoder() for _ in range(300)])
    assert of(estimates, early).tolist() == found.tolist()
    assert found[0::2].min() > 0.7
    assert found[1::2].max() < 0.3
    assert late == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_both_forms_of_learning_agree(seed: int) -> None:
    """Label by label and vectorised: counts, weights and records, over steps with repeated classes and requests,
    records at their bounds, and requests without labels."""
    rng = np.random.default_rng(seed)
    prior, drafters = rng.uniform(0.05, 0.95, 9), 3
    few, many_ = Evidence(prior, drafters), Evidence(prior, drafters)
    first = rng.choice([-8.0, 0.0, 7.9], (5, MEMORIES * drafters))
    records = [first.copy(), first.copy()]
    for _ in range(30):
        n = int(rng.integers(1, 20))
        drafter = rng.integers(0, drafters, n)
        place, rows = 3 * drafter + rng.integers(0, 3, n), rng.permutation(5)[: int(rng.integers(1, 6))]
        request = rng.integers(0, len(rows), n)
        labels = Labels(drafter, place, request, rng.uniform(0.01, 0.99, n), rng.random(n) < 0.6)
        few.learn_few(labels, records[0], rows)
        many_.learn_many(labels, records[1], rows)
        assert np.allclose(records[0], records[1])
        assert np.allclose(few.counts, many_.counts)
        around = rng.normal(0, 3, (4, MEMORIES, drafters))
        assert np.allclose(offsets(around, few.weights), offsets(around, many_.weights))
    assert not np.allclose(offsets(around, few.weights), offsets(around, Evidence(prior, drafters).weights)), (
        "something was learned"
    )


# Tenants


def test_tenants_share_nothing() -> None:
    """Alone and side by side in one step; only their own labels move a tenant's estimates."""
    estimates = AcceptanceEstimates(PRIOR, by_depth=["ngram"])
    learn(estimates, ("ngram", 0, True), steps=50, salt="a")
    assert estimates.tables("a")["ngram"][0] > 0.9
    assert estimates.tables("b")["ngram"][0] == estimates.tables()["ngram"][0] == pytest.approx(0.5)
    a, b, lone = decoder(salt="a"), decoder(salt="b"), decoder(salt="a")
    alone = AcceptanceEstimates(PRIOR)
    learn(alone, ("ngram", 0, True), steps=50, salt="a")
    for step in range(40):
        hits = [step % 3 == 0, step % 2 == 0]
        tell(estimates, many(hits, [0, 1], [0.5, 0.5]), a, b)
        tell(alone, many(hits[:1], [0], [0.5]), lone)
    assert estimates.tables("a")["ngram"].tolist() == alone.tables("a")["ngram"].tolist()
    mixed = estimates.of_batch([a, b, a], rows_of(estimates, [a, b, a]), ["ngram"])["ngram"]
    assert mixed[0].tolist() == mixed[2].tolist() != mixed[1].tolist()
    depth = estimates.by_depth("ngram", [a, b], rows_of(estimates, [a, b]), 3)
    assert depth[0, 0] != depth[1, 0]


def test_tenants_are_bounded_and_the_idlest_goes_first() -> None:
    estimates = AcceptanceEstimates(PRIOR)
    learn(estimates, ("ngram", 0, True), steps=50, salt="old")
    for i in range(255):
        learn(estimates, ("ngram", 0, False), salt=f"s{i}")
    assert estimates.tables("old")["ngram"][0] > 0.9
    learn(estimates, ("ngram", 0, False), salt="one more")
    assert estimates.tables("old")["ngram"][0] > 0.9, "it was used just now"
    assert estimates.tables("s0")["ngram"][0] == pytest.approx(0.5), "this one was not"
    assert len(estimates._evidence) == 256


# Depth


def test_survival_by_depth_follows_the_labels() -> None:
    """The first token is right nine times in ten, the second half of the time, the third never."""
    estimates = AcceptanceEstimates({"draft": np.array([0.2, 0.6])}, by_depth=["draft"])
    request = decoder()
    rows = rows_of(estimates, [request])
    first = estimates.by_depth("draft", [request], rows, 3)
    assert first[0] == pytest.approx([0.4, 0.4**2, 0.4**3]), "at first the mean of the prior"
    rng = np.random.default_rng(0)
    ones = np.ones(3, dtype=np.int64)
    for _ in range(300):
        hits = rng.random(3) < (0.9, 0.5, 0.0)
        labels = NodeLabels(("draft",), 0 * ones, ones, np.arange(1, 4), 0 * ones, np.full(3, 0.5), hits)
        tell(estimates, labels, passing := decoder())
        estimates.forget(passing)
    found = estimates.by_depth("draft", [request], rows, 5)[0]
    assert found[:3] == pytest.approx([0.9, 0.45, 0.02], abs=0.12)
    assert (np.diff(found) <= 0).all()


def test_survival_by_depth_is_known_however_deep() -> None:
    estimates = AcceptanceEstimates({"draft": np.array([0.9])}, by_depth=["draft"])
    request = decoder()
    found = estimates.by_depth("draft", [request], rows_of(estimates, [request]), 100)
    assert found.shape == (1, 100)
    assert (np.diff(found) < 0).all()


def test_the_whole_loop_is_calibrated() -> None:
    """A run whose nodes are right 0.9, 0.6 and 0.2 of the time by class, which the prior does not know.

    Each class has more than 1000 labels, so the deviation of its rate is below 0.016; the tolerance is three times
    that, and the seed is fixed.
    """
    odds = (0.9, 0.6, 0.2)
    world = World(
        [
            SimDrafter(
                odds=lambda _s, key, _r: odds[key],
                key=lambda rng, _s, _d: int(rng.integers(3)),
                prior=np.full(3, 0.5),
                most=6,
            )
        ],
        policy="fixed",
        requests=4,
    )
    world.run(100)
    steps = world.run(600)
    key, p, hit = (
        np.concatenate([getattr(s.stats.labels, column) for s in steps]) for column in ("key", "predicted", "accepted")
    )
    for k, chance in enumerate(odds):
        mine = key == k
        assert mine.sum() > 1000
        assert hit[mine].mean() == pytest.approx(chance, abs=0.05)
        assert p[mine].mean() == pytest.approx(hit[mine].mean(), abs=0.05), k


def test_requests_of_one_batch_are_told_apart() -> None:
    """Four requests, right 95, 80, 50 and 20 times in a hundred: expected in that order, each within 0.25.

    (A request's own number is pulled back to its kind, so the worst one is expected better than it is.)
    """
    odds = (0.95, 0.8, 0.5, 0.2)
    drafter = SimDrafter(odds=lambda _s, _k, request: odds[world.requests.index(request)], most=6)
    world = World([drafter], policy="fixed", requests=4)
    world.run(100)
    steps = world.run(300)
    request, p = (np.concatenate([getattr(s.stats.labels, c) for s in steps]) for c in ("request", "predicted"))
    means = [p[request == i].mean() for i in range(4)]
    assert means == sorted(means, reverse=True)
    assert means == pytest.approx(odds, abs=0.25)
    assert means[0] - means[3] > 0.4
