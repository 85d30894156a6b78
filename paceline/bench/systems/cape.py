"""CaPE, the tree of GliDe with a CaPE (2402.02082): more siblings where the draft is less sure. The GliDe draft layer,
which attends to the target's KV, is not in; the draft here is the target without a few of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from paceline.bench.systems.base import Row, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import greedy_identity
from paceline.bench.systems.trees import lengths, no_shorter, try_trees
from paceline.bench.tree_rounds import Trial
from paceline.draft.shapes.cape import CapeShape
from paceline.engine.draft_tree import Origin

NODES, DEPTH = 18, 12
"""Six levels of three; CaPE's path is as long as its siblings leave room for."""
_FIXED = 3


class FixedWidth(CapeShape):
    """A path with the same number of siblings everywhere."""

    def candidates(self, confidence: float) -> int:  # noqa: ARG002
        """Top 3."""
        return _FIXED


class ShuffledWidth(CapeShape):
    """CaPE's widths at the wrong places: each is decided by the confidence of some earlier node."""

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin)
        self._seen = [0.5]
        self._random = np.random.default_rng(0)

    def candidates(self, confidence: float) -> int:
        """By a confidence drawn from those seen so far."""
        other = self._seen[int(self._random.integers(len(self._seen)))]
        self._seen.append(confidence)
        return super().candidates(other)


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield greedy_identity(context, context.llm(context.draft("k=12"), rule="coupled", tree="cape"))[0]


def _widths(context: Context) -> Iterator[Row]:
    """Accepted length at equal node count: by confidence, fixed, and by shuffled confidence."""
    cape, fixed, shuffled = (Trial(name, "coupled", NODES, DEPTH) for name in ("cape", "fixed", "shuffled"))
    shapes = {fixed: FixedWidth(Origin.CHOSEN), shuffled: ShuffledWidth(Origin.CHOSEN)}
    found = try_trees(context, (cape, fixed, shuffled), context.few(96, 8), 0.0, shapes=shapes)
    counts = {trial.tree: float(np.mean([len(one.tree) for one in made])) for trial, made in found.items()}
    note = "nodes: " + ", ".join(f"{name} {count:.1f}" for name, count in counts.items())
    yield no_shorter("CaPE minus fixed top 3, tokens a round, T=0", found[cape], found[fixed], note)
    lost = lengths(found[cape]).mean() - lengths(found[shuffled]).mean()
    note = f"shuffling loses {lost:.2f} of the tokens"
    yield no_shorter("CaPE minus shuffled confidence", found[cape], found[shuffled], note)


run = suite(_identity, _widths)
