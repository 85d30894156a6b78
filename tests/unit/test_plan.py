"""What all policies share: room and rows of requests, given lengths, and the trim stage against a slow reference."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from engine_tools import batch_of, decoding, greedy, make_request, step_stats, tree
from plan_tools import SimDrafter, World, decoder, limits_of

from paceline.engine.draft_tree import EMPTY_TREE, DraftTree, Origin
from paceline.engine.types import Candidates, DraftBatch, SpecPlan
from paceline.plan.base import DrafterLimits, sampling
from paceline.plan.fixed import FixedLength
from paceline.plan.goodput import PricedCut
from paceline.plan.requests import RequestTable
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.trim import trim

PRIOR = {"ngram": np.array([0.5, 0.5]), "draft": np.array([0.5, 0.5])}


# Room and the table of requests


def test_room_respects_max_tokens_and_the_context() -> None:
    def room(max_model_len: int, cap: int = 20) -> list[int]:
        found: list[int] = sampling(batch, RequestTable(0), max_model_len, cap).room.tolist()
        return found

    short, long, full = (make_request(range(10), greedy(n)) for n in (4, 100, 1))
    short.token_ids += [1]
    batch = batch_of(short, long, full)
    assert room(1000) == [4 - 1 - 1, 20, 0]
    assert room(14) == [2, 3, 0]
    assert room(11) == [0, 0, 0]
    assert room(1000, 1) == [1, 1, 0]
    long.token_ids += range(95)
    assert room(1000) == [2, 4, 0], "it shrinks as the text grows"


def test_room_respects_what_a_request_asks_for() -> None:
    requests = [decoder(), decoder(cap=3), decoder(cap=0), decoder(off=True), decoder(max_tokens=3, cap=5)]
    asked = sampling(batch_of(*requests), RequestTable(0), 1000, 20)
    assert asked.room.tolist() == [20, 3, 0, 0, 2]
    assert asked.requests == tuple(requests)


def test_requests_in_prefill_are_not_asked() -> None:
    asked = sampling(batch_of(make_request(range(10)), chunk=4), RequestTable(0), 1000, 20)
    assert len(asked) == len(asked.room) == 0


def test_the_table_grows_and_rows_are_used_again() -> None:
    """200 requests at once, then 1000 that come and go in turns: nobody sees another's values."""
    table = RequestTable(2)
    many = [decoder(weight=1.0 + i / 10) for i in range(200)]
    assert table.rows(tuple(many)).tolist() == [-1] * 200
    for i, request in enumerate(many):
        row = table.batch((request,), 1000).rows
        table.records[row] = i
    rows = table.rows(tuple(many))
    assert table.batch(tuple(many), 1000).rows.tolist() == rows.tolist()
    assert len(set(rows.tolist())) == 200
    assert table.records[rows].tolist() == [[i, i] for i in range(200)], "growing moves nothing"
    assert [table.of(r).weight for r in many] == [1.0 + i / 10 for i in range(200)]
    assert table.num_special == 199, "a weight of one is nothing special"
    table.records[rows] = 7.0
    size = len(table.records)
    for request in many[:100]:
        table.forget(request)
        table.forget(request)
    assert table.rows(tuple(many[99:101])).tolist() == [-1, rows[100]]
    assert table.num_special == 100
    for _ in range(10):
        fresh = [decoder() for _ in range(100)]
        found = table.batch(tuple(fresh), 1000).rows
        assert not set(found.tolist()) & set(rows[100:].tolist())
        assert not table.records[found].any(), "a fresh row is clean"
        table.records[found] = 5.0
        for request in fresh:
            table.forget(request)
    assert len(table.records) == size
    assert (table.records[rows[100:]] == 7.0).all()


def test_a_remembered_batch_forgets_with_its_requests() -> None:
    """The same requests may run for long, then one of them ends and comes back under another row."""
    table = RequestTable(1)
    requests = tuple(decoder(cap=i) for i in range(1, 4))
    first = table.batch(requests, 1000)
    assert table.batch(requests, 1000) is first
    assert first.caps.tolist() == [1, 2, 3]
    assert table.batch(requests[::-1], 1000).rows.tolist() == first.rows[::-1].tolist()
    table.forget(requests[0])
    assert table.rows(requests).tolist() == [-1, *first.rows[1:]]
    other = decoder()
    assert table.batch((other,), 1000).rows.tolist() == [first.rows[0]], "its row was free"
    assert table.batch(requests, 1000).rows[0] not in first.rows


@pytest.mark.parametrize("name", ["auto", "bass", "heuristic", "smartspec", "smartspec-request", "threshold"])
def test_policies_keep_nothing_of_finished_requests(name: str) -> None:
    world = World([SimDrafter()], policy=name, requests=3)
    for _ in range(100):
        world.run(2)
        world.policy.forget(world.requests.pop(0))
        world.requests.append(decoder())
    assert len(world.estimates.requests.records) == 64
    kept = world.estimates.requests._known
    assert set(kept) <= set(world.requests)
    assert set(getattr(world.policy, "_lengths", ())) <= set(world.requests)


# Given lengths


def test_fixed_is_the_same_every_step() -> None:
    limits = [DrafterLimits("ngram", 4, False), DrafterLimits("draft", 3, True)]
    policy = FixedLength(limits, AcceptanceEstimates(PRIOR))
    for _ in range(3):
        plan = policy.plan(decoding(3), 1000)
        assert plan.budgets.tolist() == [7, 7, 7]
        assert (plan.bucket, plan.cut, plan.observers) == (21, None, None)
        assert plan.drafters == ("ngram", "draft")
        assert [limits_of(plan, name) for name in ("ngram", "draft")] == [[4] * 3, [3] * 3]
        policy.learn(step_stats())
    assert not policy.plan(decoding(2, max_tokens=1), 1000).looks_ahead


@pytest.mark.parametrize("name", ["auto", "bass", "heuristic", "smartspec", "smartspec-request", "threshold"])
def test_fixed_drafters_are_verified_whatever_the_policy_thinks(name: str) -> None:
    """`k=3` of a drafter that is never right, beside one that the policy decides about, where slots are dear."""
    useless = {"odds": lambda *_: 0.0, "prior": np.array([0.01])}
    fixed = SimDrafter("ngram", most=3, fixed=True, **useless)  # type: ignore[arg-type]
    planned = SimDrafter("recycling", most=8, **useless)  # type: ignore[arg-type]
    steps = World([fixed, planned], policy=name, requests=2, seconds=lambda n: 0.001 + 0.009 * n).run(80)
    for step in steps:
        assert all(t.drafter.count("ngram") == 3 for t in step.kept.trees)
    late = [t.drafter.count("recycling") for step in steps[60:] for t in step.kept.trees]
    assert max(late) <= (0 if name in ("auto", "smartspec", "smartspec-request", "threshold") else 2)


# Trimming


@dataclass(frozen=True)
class First:
    """A cut that keeps the first `count`, whatever they are worth."""

    count: int

    def size(self, candidates: Candidates) -> int:
        """The count."""
        return min(self.count, len(candidates.survival))


def random_tree(rng: np.random.Generator, size: int) -> DraftTree:
    parents = [int(rng.integers(-1, i)) for i in range(size)]
    survival = np.empty(size)
    for i, parent in enumerate(parents):  # ties of parents and children, and of strangers, are frequent
        survival[i] = rng.choice([0.25, 0.5, 0.75, 1.0]) * (1.0 if parent < 0 else survival[parent])
    return tree(rng.integers(0, 90, size).tolist(), parents, survival=survival)


def closed(draft: DraftTree, nodes: Sequence[int]) -> bool:
    return all(draft.parents[n] in (-1, *nodes) for n in nodes)


def closed_subsets(draft: DraftTree) -> list[tuple[int, ...]]:
    """All ancestor-closed node sets."""
    every = range(len(draft))
    return [n for r in range(len(draft) + 1) for n in itertools.combinations(every, r) if closed(draft, n)]


def nodes_kept(whole: DraftTree, kept: DraftTree) -> tuple[int, ...]:
    """Which nodes of a tree were kept; its keys must be node numbers."""
    nodes = kept.key.tolist()
    assert kept.tokens.tolist() == whole.tokens[nodes].tolist()
    assert kept.survival.tolist() == whole.survival[nodes].tolist()
    assert kept.drafter == tuple(whole.drafter[n] for n in nodes)
    assert [nodes[p] if p >= 0 else -1 for p in kept.parents.tolist()] == whole.parents[nodes].tolist()
    return tuple(nodes)


def numbered(draft: DraftTree) -> DraftTree:
    return dataclasses.replace(draft, key=np.arange(len(draft)))


def slow_trim(trees: Sequence[DraftTree], plan: SpecPlan, count: int) -> list[set[int]]:
    """Node by node: all that stay, then the best of those left, parents first among equals."""
    kept = [
        {
            n
            for n in range(len(t))
            if t.sampled or t.drafter[n] in plan.fixed or any(s[0] == n and s[1] in plan.fixed for s in t.shared)
        }
        for t in trees
    ]
    weights = np.ones(len(trees)) if plan.weights is None else plan.weights
    left = [(i, n) for i, t in enumerate(trees) for n in range(len(t)) if n not in kept[i]]
    count = min(count, max(0, plan.bucket - sum(map(len, kept))))
    for _ in range(min(count, len(left))):
        best = max(left, key=lambda at: (trees[at[0]].survival[at[1]] * weights[at[0]], -at[0], -at[1]))
        left.remove(best)
        kept[best[0]].add(best[1])
    return kept


@pytest.mark.parametrize("seed", range(200))
def test_trim_equals_a_slow_reference(seed: int) -> None:
    """Batches of up to six trees, some empty, some sampled, some of two drafters of which one may be fixed."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(int(rng.integers(1, 7))):
        size = int(rng.integers(0, 7))
        draft = numbered(random_tree(rng, size))
        if rng.random() < 0.2:
            draft = dataclasses.replace(draft, origin=Origin.INDEPENDENT)
        else:  # a fixed drafter's nodes come with their ancestors; a node may be shared with it
            roots = rng.random(size) < 0.5
            mine = {n for n in range(size) if roots[n] and draft.parents[n] < 0}
            mine |= {n for n in range(size) if roots[n] and draft.parents[n] in mine}
            shared = tuple((n, "fixed", 0) for n in sorted(mine) if rng.random() < 0.3)
            owner = {n for n, _, _ in shared}
            names = tuple("fixed" if n in mine - owner else "ngram" for n in range(size))
            draft = dataclasses.replace(draft, drafter=names, shared=shared)
        trees.append(draft)
    bucket = int(rng.integers(0, 24))
    plan = SpecPlan(
        np.full(len(trees), 8),
        ("ngram", "fixed"),
        bucket,
        {},
        cut=First(int(rng.integers(0, 30))) if rng.random() < 0.7 else None,
        fixed=frozenset({"fixed"}) if rng.random() < 0.7 else frozenset(),
        weights=rng.choice([0.5, 1.0, 2.0], len(trees)) if rng.random() < 0.5 else None,
    )
    kept = trim(DraftBatch(tuple(trees), {"ngram": 0.5}), plan)
    assert kept.seconds == {"ngram": 0.5}
    wanted = 1000 if plan.cut is None else plan.cut.count  # type: ignore[attr-defined]
    found = [nodes_kept(a, b) for a, b in zip(trees, kept.trees, strict=True)]
    assert found == [tuple(sorted(nodes)) for nodes in slow_trim(trees, plan, wanted)]
    assert all(closed(t, nodes) for t, nodes in zip(trees, found, strict=True))


def test_behind_the_last_tree_stand_empty_ones() -> None:
    """The second of two siblings is the better one, and the trees behind theirs are empty."""
    draft = numbered(tree([1, 2], [-1, -1], survival=np.array([0.2, 0.8])))
    plan = SpecPlan(np.full(3, 2), ("ngram",), 6, {}, cut=First(1))
    kept = trim(DraftBatch((draft, EMPTY_TREE, EMPTY_TREE)), plan)
    assert [nodes_kept(draft, kept.trees[0]), len(kept.trees[1]), len(kept.trees[2])] == [(1,), 0, 0]


def plan_with(times: np.ndarray, goodput: float, requests: int = 1) -> SpecPlan:
    bucket = len(times) - 1
    return SpecPlan(np.full(requests, bucket), ("ngram",), bucket, {}, cut=PricedCut(times, goodput, share=0.1))


def steps(rng: np.random.Generator, bucket: int) -> np.ndarray:
    """A time table with tiles: flat, then a jump."""
    return 1.0 + np.cumsum(np.where(np.arange(bucket + 1) % 3 == 1, rng.uniform(0.0, 2.0, bucket + 1), 0.01))


@pytest.mark.parametrize("seed", range(30))
def test_the_priced_trim_is_the_best_of_all_subsets(seed: int) -> None:
    """Over all ancestor-closed subsets of two requests' trees, with a step-shaped time table."""
    rng = np.random.default_rng(seed)
    trees = [numbered(random_tree(rng, 6)), numbered(random_tree(rng, 5))]
    bucket, goodput = int(rng.integers(3, 12)), float(rng.uniform(0.1, 1.5))
    times = steps(rng, bucket)

    def value(nodes: Sequence[Sequence[int]]) -> float:
        gain = sum(t.survival[list(n)].sum() for t, n in zip(trees, nodes, strict=True))
        return float(gain - goodput * (times[sum(map(len, nodes))] - times[0]))

    pairs = itertools.product(*map(closed_subsets, trees))
    best = max(value(pair) for pair in pairs if sum(map(len, pair)) <= bucket)
    kept = trim(DraftBatch(tuple(trees)), plan_with(times, goodput, 2))
    found = [nodes_kept(a, b) for a, b in zip(trees, kept.trees, strict=True)]
    assert value(found) == pytest.approx(best)
    last = min((t.survival[n] for t, nodes in zip(trees, found, strict=True) for n in nodes), default=1.0)
    assert kept.slot_price == last


def test_trim_never_stops_at_a_first_drop() -> None:
    """The first node does not pay for the jump; all eight together do."""
    draft = tree(list(range(8)), list(range(-1, 7)), survival=np.full(8, 0.9))
    times = np.array([1.0] + [3.0] * 8)
    assert trim(DraftBatch((draft,)), plan_with(times, 1.0)).num_nodes == 8
    assert trim(DraftBatch((draft,)), plan_with(times, 3.7)).num_nodes == 0


def test_trim_to_a_bucket_without_a_cut() -> None:
    first = tree([1, 2], [-1, 0], survival=np.array([0.9, 0.5]))
    second = tree([3, 4], [-1, 0], survival=np.array([0.8, 0.7]))
    drafts = DraftBatch((first, second))
    kept = trim(drafts, SpecPlan(np.full(2, 2), ("ngram",), 3, {}))
    assert [t.tokens.tolist() for t in kept.trees] == [[1], [3, 4]]
    assert trim(drafts, SpecPlan(np.full(2, 2), ("ngram",), 4, {})) is drafts


def test_sampled_trees_are_kept_whole() -> None:
    """They take their share of the time table first; the others get what still pays."""
    sampled = tree([1, 2, 3], [-1, 0, 1], survival=np.array([0.1, 0.01, 0.001]), origin=Origin.DISTINCT)
    chosen = tree([4, 5], [-1, 0], survival=np.array([0.9, 0.5]))
    times = np.array([1.0, 1.5, 2.0, 2.5, 3.3, 4.1])  # a fourth and fifth node cost 0.8 each
    kept = trim(DraftBatch((sampled, chosen)), plan_with(times, 1.0, 2))
    assert [len(t) for t in kept.trees] == [3, 1]
    kept = trim(DraftBatch((sampled, chosen)), plan_with(times, 1.5, 2))  # 0.5 * 1.5 would still pay
    assert [len(t) for t in kept.trees] == [3, 0]
    only = DraftBatch((sampled,))
    assert trim(only, plan_with(times[:2], 9.0)).trees == (sampled,)
