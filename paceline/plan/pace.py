"""How a machine's pace differs from a cost table, learned from the steps it makes.

The logarithm of measured over expected time is the sum of a level, which drifts, and a shape by number of draft nodes,
which hardly does. One `Tracker` for every order of magnitude of requests tells the two apart: once both are known, a
sudden change at one size is the level's, since the shape is not believed to jump.
"""

from __future__ import annotations

import math

import numpy as np

from paceline.arrays import FloatArray
from paceline.plan.tracker import Tracker

_LEVELS = 12
"""The shape is known at 0, 1, 3, 7 .. 2 ** (_LEVELS - 1) - 1 draft nodes, and linear in between (in the logarithm)."""
_NOISE = 0.1
"""Relative scatter of step times before any was measured."""
_LEAST_NOISE = 0.03
"""The least that is assumed later, ..."""
_NOISE_RATE = 0.02
"""... and how fast it follows what is measured."""
_LEVEL_DRIFT = 0.005
"""Drift of the level in a step, in units of the noise: it follows a new pace within some 15 steps."""
_IDLE = 1000
"""Most steps without a measurement that add to the drift."""
_SHAPE_KEEP = 0.9995
"""Share of the shape that survives a step: what only looked dear once is tried again."""
_LEVEL_SPREAD = 0.3
_SHAPE_SPREAD = 0.2
_NEIGHBOURS = 3.0
"""Knots over which what is seen at one size says something about the next."""


class Pace:
    """Factors on a cost table."""

    def __init__(self) -> None:
        apart = np.abs(np.subtract.outer(np.arange(_LEVELS), np.arange(_LEVELS)))
        self._spread = np.zeros((_LEVELS + 1, _LEVELS + 1))
        self._spread[0, 0] = _LEVEL_SPREAD**2
        self._spread[1:, 1:] = _SHAPE_SPREAD**2 * np.exp(-apart / _NEIGHBOURS)
        self._drift = np.array([_LEVEL_DRIFT] + [0.0] * _LEVELS)
        self._keep = np.array([1.0] + [_SHAPE_KEEP] * _LEVELS)
        self._noise = _NOISE**2
        self._step = 0
        self._trackers: dict[int, tuple[Tracker, int]] = {}  # by size of batch, with the step of its last measurement
        self._current = np.zeros(_LEVELS + 1)
        self._logs = np.empty(0)

    def factors(self, most: int, num_requests: int) -> FloatArray:
        """Factors for 0 .. `most` draft nodes.  # [most + 1]"""
        if len(self._logs) <= most:
            self._logs = np.log2(np.arange(1.0, most + 2.0))
        entry = self._trackers.get(_level(num_requests))
        values = self._current if entry is None else entry[0].values
        logs = np.interp(self._logs[: most + 1], _KNOTS, values[1:] + values[0])
        factors: FloatArray = np.exp(logs, out=logs)
        return factors

    def learn(self, num_requests: int, nodes: int, ratio: float) -> None:
        """Take in a step over `nodes` draft nodes that took `ratio` times what the table says."""
        self._step += 1
        at = _level(num_requests)
        if at not in self._trackers:  # what the last size of batch has taught is the best guess
            tracker = Tracker(np.zeros(_LEVELS + 1), self._spread, self._keep)
            tracker.values[:] = self._current
            self._trackers[at] = tracker, self._step - 1
        tracker, last = self._trackers[at]
        self._trackers[at] = tracker, self._step
        drift = self._drift * min(self._step - last, _IDLE)
        scatter = tracker.learn(_row(nodes), math.log(ratio), self._noise, drift)
        self._noise = max(self._noise * (1.0 + _NOISE_RATE * (scatter - 1.0)), _LEAST_NOISE**2)
        self._current = tracker.values


_KNOTS = np.arange(float(_LEVELS))


def _row(nodes: int) -> FloatArray:
    """The level, and the two knots of the shape between which `nodes` lies.  # [_LEVELS + 1]"""
    position = min(math.log2(nodes + 1), _LEVELS - 1.0)
    knot = min(int(position), _LEVELS - 2)
    row = np.zeros(_LEVELS + 1)
    row[0], row[1 + knot], row[2 + knot] = 1.0, 1.0 - (position - knot), position - knot
    return row


def _level(num_requests: int) -> int:
    return int(math.log2(max(num_requests, 1)) + 0.5)
