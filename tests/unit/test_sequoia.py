"""Sequoia: the dynamic programme against all trees there are, the choice of size and depth, what ranks are believed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from engine_tools import decoding
from plan_tools import SimDrafter, World, cheap, cost_of, flat_then_linear, steep

from paceline.draft.shapes.sequoia import PRIOR
from paceline.engine.positional import RANKS, TreeNode, best_trees, expected_accepted, positional, tree_table
from paceline.engine.types import SpecPlan
from paceline.plan.base import DrafterLimits
from paceline.plan.cost_model import DraftCost
from paceline.plan.sequoia import SequoiaLength, TreeSize, best_size
from paceline.plan.survival import AcceptanceEstimates

FALLING = 0.7 / np.arange(1, 9) ** 1.5
VECTORS = {
    "falling": FALLING,
    "flat": np.full(8, 0.12),
    "rising": np.linspace(0.02, 0.2, 8),
    "one rank": np.array([0.8]),
    "zeros": np.array([0.5, 0.0, 0.0, 0.3]),
}


def all_trees(nodes: int, depth: int, ranks: int) -> Iterator[tuple[tuple[object, ...], ...]]:
    """Every tree below a root as nested tuples of children, with exactly so many nodes."""
    if not nodes:
        yield ()
        return
    if depth:
        for shares in compositions(nodes, ranks):
            below = [list(all_trees(share - 1, depth - 1, ranks)) for share in shares]
            yield from itertools.product(*below)  # type: ignore[misc]


def compositions(total: int, most: int) -> Iterator[tuple[int, ...]]:
    """Ordered sums of positive numbers, at most `most` of them."""
    if not total:
        yield ()
    elif most:
        for first in range(1, total + 1):
            yield from ((first, *rest) for rest in compositions(total - first, most - 1))


def value(children: Sequence[Sequence[object]], acceptance: np.ndarray) -> float:
    return sum(acceptance[b] * (1.0 + value(child, acceptance)) for b, child in enumerate(children))  # type: ignore[arg-type]


def levels(tree: Sequence[TreeNode]) -> int:
    depths: list[int] = []
    for node in tree:
        depths.append(1 + (depths[node.parent] if node.parent >= 0 else 0))
    return max(depths, default=0)


# The dynamic programme


@pytest.mark.parametrize("name", VECTORS)
def test_it_finds_the_best_of_all_trees(name: str) -> None:
    acceptance = VECTORS[name]
    for depth in (1, 2, 3, 7):
        table = best_trees(acceptance, 7, depth)
        best = 0.0
        for nodes in range(8):
            of_size = [value(tree, acceptance) for tree in all_trees(nodes, depth, len(acceptance))]
            best = max([best, *of_size])
            assert table.gain[table.level(depth), nodes] == pytest.approx(best, abs=1e-12)


def test_there_are_as_many_trees_as_there_must_be() -> None:
    """Catalan's numbers: the brute force above leaves none out."""
    assert [sum(1 for _ in all_trees(n, n, n)) for n in range(8)] == [1, 1, 2, 5, 14, 42, 132, 429]


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize(("nodes", "depth"), [(1, 1), (7, 2), (30, 5), (64, 64)])
def test_the_tree_is_worth_what_the_table_says(name: str, nodes: int, depth: int) -> None:
    acceptance = VECTORS[name]
    table = best_trees(acceptance, nodes, depth)
    tree = table.tree(nodes, depth)
    assert expected_accepted(tree, acceptance) == pytest.approx(table.gain[table.level(depth), nodes])
    assert 0 < len(tree) <= nodes
    assert levels(tree) <= depth
    seen: dict[int, int] = {}
    for i, node in enumerate(tree):
        assert -1 <= node.parent < i
        assert node.rank == seen.get(node.parent, 0), "siblings stand in rank order and none is left out"
        seen[node.parent] = node.rank + 1


def test_more_never_brings_less() -> None:
    gain = best_trees(FALLING, 64, 12).gain
    assert (np.diff(gain, axis=0) >= 0.0).all()
    assert (np.diff(gain, axis=1) >= 0.0).all()
    assert (np.diff(gain[-1]) < FALLING[0] + 1e-12).all(), "a node cannot bring more than a child of the root"


def test_a_sure_first_child_makes_a_chain_and_hopeless_ones_a_star() -> None:
    chain = best_trees(np.array([1.0, 0.0, 0.0]), 9, 9).tree(9, 9)
    assert [node.parent for node in chain] == list(range(-1, 8))
    star = best_trees(np.full(16, 1e-3), 9, 9).tree(9, 9)
    assert [node.parent for node in star] == [-1] * 9


def test_a_table_is_kept_and_holds_the_smaller_trees() -> None:
    """The table of a slightly different vector and a smaller tree is the same one, and hardly worse."""
    other = FALLING * 1.01
    table = tree_table(FALLING, 60, 10)
    assert tree_table(other, 50, 12) is table
    for nodes in (8, 50):
        exact = best_trees(other, nodes, 12)
        kept = expected_accepted(table.tree(nodes, 12), other)
        assert kept > 0.995 * exact.gain[-1, nodes]


def test_it_takes_milliseconds() -> None:
    """64 nodes, depth 10, all ranks; a generous bound, since the machine may be busy."""
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        best_trees(PRIOR, 64, 10)
        best = min(best, time.perf_counter() - start)
    assert best < 0.05


# What is believed of ranks


def test_estimates_fall_and_leave_something_for_the_rest() -> None:
    assert positional(np.array([0.6, 0.1, 0.2, 0.05])).tolist() == pytest.approx([0.6, 0.1, 0.1, 0.05])
    assert positional(np.array([0.9, 0.4, 0.4])).tolist() == pytest.approx([0.9, 0.1, 0.0])
    assert positional(PRIOR) == pytest.approx(PRIOR), "the prior is a vector that can be"
    assert len(PRIOR) == RANKS
    rng = np.random.default_rng(0)
    for _ in range(100):
        found = positional(rng.random(RANKS))
        assert (np.diff(found) <= 0.0).all()
        assert (found >= 0.0).all()
        assert found.sum() <= 1.0 + 1e-12


# Size and depth


def test_the_choice_is_the_least_time_per_token() -> None:
    """Against the definition written out, with a table of times that has steps."""
    table = best_trees(FALLING, 24, 8)
    target = 0.010 + 0.004 * np.floor(np.arange(25) / 8)
    draft = 0.0007 * np.arange(len(table.gain))
    times = {
        TreeSize(m, d): (draft[d] + target[m]) / (1.0 + table.gain[d, m])
        for m in range(25)
        for d in range(len(table.gain))
        if (m == 0) == (d == 0)
    }
    assert best_size(table.gain, target, draft) == min(times, key=times.__getitem__)
    without_zero = {size: seconds for size, seconds in times.items() if size.nodes}
    assert best_size(table.gain, target, draft + 1.0, least=1).nodes > 0
    assert best_size(table.gain, target, draft, least=1) == min(without_zero, key=without_zero.__getitem__)


def size_on(seconds: object, per_depth: float, requests: int = 1, most: int = 32) -> SpecPlan:
    estimates = AcceptanceEstimates({"draft": PRIOR}, by_depth=["draft"])
    limits = [DrafterLimits("draft", most, True, by_rank=True)]
    cost = cost_of(seconds, {"draft": DraftCost(per_depth=per_depth)}, adapt=False)  # type: ignore[arg-type]
    policy = SequoiaLength(limits, estimates, cost)
    policy.plan(decoding(requests), 1000)  # the first step looks ahead in any case
    return policy.plan(decoding(requests), 1000)


def test_the_machine_decides() -> None:
    """Cheap slots: a large tree; dear ones: a smaller one or none. A slow draft model makes it shallow."""
    roomy, dear = size_on(cheap, 0.0005), size_on(flat_then_linear, 0.0005)
    assert roomy.limits["draft"] == 32
    assert 0 < np.max(dear.limits["draft"]) < 32
    assert not size_on(steep, 0.0005).looks_ahead
    assert size_on(cheap, 0.003).depths["draft"] < roomy.depths["draft"]
    assert np.max(size_on(flat_then_linear, 0.0005, requests=8).limits.get("draft", 0)) < np.max(dear.limits["draft"])


def test_it_follows_what_is_measured() -> None:
    """A chain that is always right grows to its cap; one that never is stops, and is tried again now and then."""
    steps = World([SimDrafter(odds=lambda *_: 0.99, most=12)], policy="sequoia").run(200)
    assert steps[-1].nodes == 12
    turned = World([SimDrafter(odds=lambda step, *_: 0.0 if step < 400 else 0.99, most=12)], policy="sequoia")
    steps = turned.run(2000)
    assert np.mean([s.nodes > 0 for s in steps[200:400]]) < 0.1
    assert any(s.nodes for s in steps[200:400])
    assert np.mean([s.nodes for s in steps[-200:]]) > 8
