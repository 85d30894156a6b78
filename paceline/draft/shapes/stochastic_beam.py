"""RSD-S (2402.14160): a tree drawn by stochastic beam search (Kool et al. 1903.06059).

Every level keeps the `width` best of all beams' children by perturbed log-probability, where a child's noise is
conditioned on its parent's: the best child of a beam has the beam's own value. That is sampling sequences without
replacement, and siblings come out in the order of their draws, which `recursive` relies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paceline.arrays import FloatArray
from paceline.draft.scored import Scored
from paceline.draft.shapes.base import PRIOR, Child, Growth, check_counts, confidence_key
from paceline.engine.draft_tree import Origin
from paceline.errors import ConfigError


class StochasticBeamShape:
    """The shape.

    Args:
        origin: how siblings are drawn; independent draws are no beam search.
        width: beams of every level.

    Raises:
        ConfigError: the rule wants independent siblings, or the width is impossible.
    """

    name = "rsd-s"
    prior = PRIOR
    by_rank = False

    def __init__(self, origin: Origin, width: int = 4) -> None:
        if origin is Origin.INDEPENDENT:
            raise ConfigError(
                "rsd-s draws without replacement, and rule multi is exact only for draws with replacement.",
                field="tree",
                fix="Use --rule recursive or --rule coupled with it.",
            )
        check_counts("the width", [width], "rsd-s:width=4")
        self.origin = origin
        self.width = float(width)
        self._beams = width

    def start(self, budget: int, depth: int, acceptance: FloatArray | None) -> Growth:  # noqa: ARG002
        """An empty tree."""
        return _Beams(self._beams, budget, depth)


class _Beam(NamedTuple):
    log_probability: float
    perturbed: float


class _Candidate(NamedTuple):
    child: Child
    beam: _Beam


class _Beams:
    def __init__(self, width: int, budget: int, depth: int) -> None:
        self._width = width
        self._left = budget
        self._depth = depth
        self._beams = {-1: _Beam(0.0, 0.0)}

    def grow(self, scored: Sequence[Scored], next_node: int) -> Sequence[Child]:
        width = min(self._width, self._left)
        expand = scored[0].depth + 1 < self._depth and self._left > width
        found = [c for parent in scored for c in self._candidates(parent, width, expand=expand)]
        found.sort(key=lambda c: -c.beam.perturbed)
        best = found[:width]
        self._left -= len(best)
        self._beams = {next_node + i: c.beam for i, c in enumerate(best)}
        return [c.child for c in best]

    def finish(self, next_node: int) -> Sequence[Child]:  # noqa: ARG002
        return ()

    def _candidates(self, parent: Scored, count: int, *, expand: bool) -> list[_Candidate]:
        beam = self._beams[parent.node]
        ranked = parent.ranked(count, exhaust=False)
        if not ranked.tokens:
            return []
        values = conditioned(beam.perturbed, beam.log_probability + ranked.scores)
        logs = beam.log_probability + parent.log_probabilities(ranked.tokens)
        chances = parent.chances(ranked.tokens)
        rows = zip(ranked.tokens, chances, logs.tolist(), values.tolist(), strict=True)
        return [
            _Candidate(Child(parent.node, token, confidence_key(chance, rank), expand), _Beam(log, value))
            for rank, (token, chance, log, value) in enumerate(rows)
        ]


def conditioned(parent: float, perturbed: FloatArray) -> FloatArray:
    """Perturbed values of a beam's children, given that the largest equals the beam's own.

    Args:
        parent: the beam's value G.
        perturbed: unconditioned values g, largest first: -log(exp(-G) - exp(-max g) + exp(-g)) is wanted.  # [n]
    """
    with np.errstate(divide="ignore"):
        below = np.log1p(-np.exp(np.minimum(perturbed - perturbed[0], 0.0)))  # -inf for the largest
    v = parent - perturbed + below
    return np.asarray(parent - np.maximum(v, 0.0) - np.log1p(np.exp(-np.abs(v))))
