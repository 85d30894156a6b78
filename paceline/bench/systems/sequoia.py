"""Sequoia (2402.12374): trees by a dynamic programme over acceptance by sibling rank, sized for the machine.

The draft is the target without a few of its layers, whose positional vector is learned at other contexts first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product

import numpy as np

from paceline.arrays import FloatArray
from paceline.bench.systems.base import Row, at_least, at_most, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import greedy_identity
from paceline.bench.systems.trees import decided, error_of_mean, lengths, no_shorter, ranks_of, try_trees
from paceline.bench.tree_rounds import Trial
from paceline.engine.positional import best_trees, positional
from paceline.plan.sequoia import best_size

SIZES = (16, 64)
DEPTH = 10
_RIVALS = ("chain", "k-ary:k=2", "k-ary:k=3")
_TEMPERATURE = 0.6
_SWEEP = (0.2, 0.6, 1.0, 1.2)
_TREES = 7
_CONTEXTS = 1024
"""So many tell 5% of a tree's length: their standard error is under 2% of it."""
_PRICES = (0.03, 0.3, 3.0)
"""By how much the largest tree lengthens a step."""


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    llm = context.llm(context.draft("max=16") + "@sequoia", rule="recursive", tree="sequoia")
    yield greedy_identity(context, llm)[0]


def _ranks(context: Context) -> dict[str, FloatArray]:
    """Acceptance by sibling rank under both rules for drawn trees, at one temperature."""
    return ranks_of(context, ("recursive", "multi"), _TEMPERATURE, SIZES[-1], DEPTH)


def _vector(context: Context) -> FloatArray:
    return positional(_ranks(context)["recursive"])


def brute_force(acceptance: FloatArray, nodes: int) -> float:
    """Expected accepted nodes of the best of all trees with at most so many nodes.

    Args:
        acceptance: by sibling rank.  # [ranks]
        nodes: few: 429 trees have 7.
    """

    @cache
    def values(size: int) -> tuple[float, ...]:
        """Of every tree of exactly that size."""
        return tuple(v for shares in _compositions(size, len(acceptance)) for v in _sums(shares))

    def _sums(shares: Sequence[int]) -> Iterator[float]:
        for below in product(*(values(share - 1) for share in shares)):
            yield sum(float(a) * (1.0 + v) for a, v in zip(acceptance, below, strict=False))

    return max(value for size in range(nodes + 1) for value in values(size))


def _compositions(total: int, most: int) -> Iterator[tuple[int, ...]]:
    """Ordered sums of at most so many positive numbers."""
    if not total:
        yield ()
    elif most:
        for first in range(1, total + 1):
            yield from ((first, *rest) for rest in _compositions(total - first, most - 1))


def _programme(context: Context) -> Iterator[Row]:
    """The dynamic programme against all trees of up to seven nodes."""
    vector = _vector(context)
    made_up = np.random.default_rng(0).random((4, 6)) / 3
    gaps = []
    for acceptance in (vector, *made_up):
        gain = best_trees(acceptance, _TREES, _TREES).gain[-1]
        gaps += [abs(float(gain[n]) - brute_force(acceptance, n)) for n in range(_TREES + 1)]
    note = f"measured and made-up vectors, sizes 0 to {_TREES}"
    yield at_most("dynamic programme minus the best of all trees", max(gaps), 1e-12, note)


def _predicted(context: Context) -> Iterator[Row]:
    """Predicted against measured accepted length, and against chain and k-ary trees."""
    ranks = _ranks(context)
    trials = [Trial(tree, "recursive", nodes, DEPTH) for nodes in SIZES for tree in (*_RIVALS, "sequoia")]
    found = try_trees(context, trials, context.few(_CONTEXTS, 4), _TEMPERATURE, ranks=ranks)
    table = best_trees(positional(ranks["recursive"]), SIZES[-1], DEPTH)
    gaps = []
    for nodes in SIZES:
        ours = found[Trial("sequoia", "recursive", nodes, DEPTH)]
        measured, error = float(lengths(ours).mean()), error_of_mean(lengths(ours))
        predicted = 1.0 + float(table.gain[table.level(DEPTH), nodes])
        off = abs(predicted - measured) / measured
        note = f"predicted {predicted:.2f}, measured {measured:.2f} over {len(ours)} contexts, T={_TEMPERATURE}"
        yield decided(at_most(f"{nodes} nodes: predicted length off by", off, 0.05, note), error / measured)
        rivals = {tree: found[Trial(tree, "recursive", nodes, DEPTH)] for tree in _RIVALS}
        best = max(rivals, key=lambda tree: float(lengths(rivals[tree]).mean()))
        yield no_shorter(f"{nodes} nodes: tokens a round over the best of chain and k-ary", ours, rivals[best], best)
        gaps.append(lengths(ours) - lengths(rivals[best]))
    grown = gaps[-1] - gaps[0]
    note = f"over the best rival: {gaps[0].mean():+.2f} at {SIZES[0]} nodes, {gaps[-1].mean():+.2f} at {SIZES[-1]}"
    yield decided(at_least("growth of the gain with the size", float(grown.mean()), 0.0, note), error_of_mean(grown))


def _robust(context: Context) -> Iterator[Row]:
    """Without replacement against with replacement, over temperatures."""
    without, replaced = Trial("sequoia", "recursive", 32, DEPTH), Trial("sequoia", "multi", 32, DEPTH)
    for temperature in _SWEEP[:: context.few(1, 3)]:
        found = try_trees(context, (without, replaced), context.few(256, 4), temperature, ranks=_ranks(context))
        test = f"T={temperature:g}: without minus with replacement, tokens a round"
        yield no_shorter(test, found[without], found[replaced])


def _machine(context: Context) -> Iterator[Row]:
    """The size follows the machine: where slots are dear, trees are smaller."""
    table = best_trees(_vector(context), SIZES[-1], DEPTH)
    draft: FloatArray = np.asarray(0.05 * np.arange(len(table.gain)), dtype=np.float64)
    slots: FloatArray = np.linspace(0.0, 1.0, SIZES[-1] + 1)
    sizes = [best_size(table.gain, np.add(1.0, price * slots), draft).nodes for price in _PRICES]
    note = f"{sizes} nodes where {SIZES[-1]} lengthen a step by 3%, 30% and 300%"
    yield at_least("cheap slots: nodes over those with dear slots", sizes[0] / max(sizes[-1], 1), 2.0, note)


run = suite(_identity, _programme, _predicted, _robust, _machine)
