"""Rows about trees hold or fail only by more than chance."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.bench.systems.base import at_least, at_most
from paceline.bench.systems.trees import decided, no_shorter
from paceline.bench.tree_rounds import Round
from paceline.engine.draft_tree import EMPTY_TREE
from paceline.engine.types import NodeLabels, Walk


@pytest.mark.parametrize(
    ("figure", "error", "passed"),
    [(0.8, 0.04, True), (0.8, 0.06, None), (0.6, 0.04, False), (0.6, 0.06, None), (0.8, float("inf"), None)],
)
def test_a_row_near_its_bound_is_undecided(figure: float, error: float, passed: bool | None) -> None:
    assert decided(at_least("t", figure, 0.7), error).passed is passed
    opposite = {True: False, False: True, None: None}[passed]
    assert decided(at_most("t", figure, 0.7), error).passed is opposite


def _rounds(lengths: np.ndarray) -> list[Round]:
    nothing = NodeLabels(*(np.empty(0) for _ in NodeLabels.__dataclass_fields__))
    return [Round(EMPTY_TREE, Walk((), (0,) * int(n)), nothing) for n in lengths]


def test_a_shorter_tree_does_not_pass() -> None:
    """By how much it may be shorter does not grow with the noise."""
    lengths = np.random.default_rng(0).integers(1, 6, 4000)
    longer = lengths + (np.arange(4000) % 4 == 0)
    assert no_shorter("t", _rounds(longer), _rounds(lengths)).passed is True
    assert no_shorter("t", _rounds(lengths), _rounds(lengths)).passed is True
    assert no_shorter("t", _rounds(lengths), _rounds(longer)).passed is False
    few = np.random.default_rng(1).integers(1, 6, (2, 20))
    assert no_shorter("t", *map(_rounds, few)).passed is None
