"""What one tenant's labels say: how often each confidence class is accepted, and what a request's record is worth.

A class's estimate is (prior + accepted) / (prior weight + seen); old evidence fades with every step that labels the
class. A request's record, for every drafter, is how far its labels were from what is typical of their classes, summed
with two memories: the latest step and the last dozens. What these two numbers are worth in log-odds differs from
drafter to drafter (a copier that has just been right stays right; a good draft model says it all in its classes), so
their weights are learned by Newton steps along the likelihood of the labels: online logistic regression.

A step of few labels is learned from in plain Python, which numpy's calls would take longer than; the two forms agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray

MEMORIES = 2
_FADE = 0.98
"""Weight of a class's evidence after each step that labels it: a memory of about 50 steps."""
_PRIOR_WEIGHT = 4.0
_KEEP = (0.2, 0.95)
"""Share of a record that survives a labelled step, by memory."""
_KEEPS = np.array(_KEEP)[:, None]
_MAX_RECORD = 8.0
_FIRST_WEIGHT = 0.1
_WEIGHT_RANGE = (-0.2, 2.0)
_MAX_OFFSET = 3.0
_CURVATURE_FADE = 0.995
_CURVATURE_PRIOR = 30.0
"""Curvature of the likelihood, in labels times variance, that the first weights count for."""
_CERTAIN = 1e-9
"""Estimates stay this far from 0 and 1."""
FEW = 12
"""Most labels that plain Python handles faster."""


@dataclass(frozen=True, slots=True)
class Labels:
    """One tenant's labels of a step."""

    drafter: IntArray  # [n]
    place: IntArray  # [n], class among all drafters' classes
    request: IntArray  # [n], number of the request in the step
    predicted: FloatArray  # [n]
    accepted: BoolArray  # [n]

    def take(self, mine: IntArray, request: IntArray) -> Labels:
        """Some of the labels, their requests numbered anew."""
        return Labels(self.drafter[mine], self.place[mine], request, self.predicted[mine], self.accepted[mine])


class Evidence:
    """One tenant's.

    Args:
        prior: first guess of every class.  # [classes]
        drafters: how many there are.
    """

    def __init__(self, prior: FloatArray, drafters: int) -> None:
        self._prior = prior
        self.counts = np.zeros((2, len(prior)))  # fading [seen, accepted]
        self.weights = np.full((MEMORIES, drafters), _FIRST_WEIGHT)
        self._curvature = np.zeros((3, drafters))  # [00, 01, 11]
        self._odds: FloatArray | None = None

    def odds(self) -> FloatArray:
        """Odds of acceptance by class.  # [classes]"""
        if self._odds is None:
            seen, accepted = self.counts
            chance = (_PRIOR_WEIGHT * self._prior + accepted) / (_PRIOR_WEIGHT + seen)
            chance = np.minimum(np.maximum(chance, _CERTAIN), 1.0 - _CERTAIN)
            self._odds = chance / (1.0 - chance)
        return self._odds

    def learn(self, labels: Labels, records: FloatArray, rows: IntArray) -> None:
        """Take in labels and update the records of their requests in place.

        Args:
            labels: of one step.
            records: of all requests.  # [capacity, MEMORIES * drafters]
            rows: the record of each of the step's requests.  # [requests]
        """
        learn = self.learn_few if len(labels.place) <= FEW else self.learn_many
        learn(labels, records, rows)
        self._odds = None

    def learn_many(self, labels: Labels, records: FloatArray, rows: IntArray) -> None:
        """The vectorised form."""
        drafters = self.weights.shape[1]
        mine, accepted = records[rows], labels.accepted  # [requests, MEMORIES * drafters]
        x0, x1 = mine[labels.request, labels.drafter], mine[labels.request, drafters + labels.drafter]
        error, spread = accepted - labels.predicted, labels.predicted * (1.0 - labels.predicted)
        sums = [
            np.bincount(labels.drafter, values, minlength=drafters)
            for values in (x0 * error, x1 * error, x0 * x0 * spread, x0 * x1 * spread, x1 * x1 * spread)
        ]
        for i in np.flatnonzero(np.bincount(labels.drafter, minlength=drafters)).tolist():
            self._step(i, [float(values[i]) for values in sums])
        place = labels.request * drafters + labels.drafter
        surprise = np.bincount(place, accepted - self._typical(labels.place), minlength=len(rows) * drafters)
        touched = np.bincount(place, minlength=len(rows) * drafters) > 0
        self.count(labels.place, accepted)
        shape = (len(rows), 1, drafters)
        before = mine.reshape(len(rows), MEMORIES, drafters)
        moved = np.minimum(np.maximum(_KEEPS * before + surprise.reshape(shape), -_MAX_RECORD), _MAX_RECORD)
        records[rows] = np.where(touched.reshape(shape), moved, before).reshape(mine.shape)

    def learn_few(self, labels: Labels, records: FloatArray, rows: IntArray) -> None:
        """The same, label by label."""
        drafters = self.weights.shape[1]
        steps: dict[int, list[float]] = {}
        counts: dict[int, list[float]] = {}
        surprises: dict[tuple[int, int], float] = {}
        columns = (labels.drafter, labels.place, rows[labels.request], labels.predicted, labels.accepted)
        for drafter, place, row, predicted, accepted in zip(*[c.tolist() for c in columns], strict=True):
            x0, x1 = records.item(row, drafter), records.item(row, drafters + drafter)
            error, spread = accepted - predicted, predicted * (1.0 - predicted)
            sums = steps.setdefault(drafter, [0.0] * 5)
            for i, value in enumerate((x0 * error, x1 * error, x0 * x0 * spread, x0 * x1 * spread, x1 * x1 * spread)):
                sums[i] += value
            seen, hits = self.counts.item(0, place), self.counts.item(1, place)
            typical = (_PRIOR_WEIGHT * self._prior.item(place) + hits) / (_PRIOR_WEIGHT + seen)
            count = counts.setdefault(place, [_FADE * seen, _FADE * hits])
            count[0] += 1.0
            count[1] += accepted
            surprises[row, drafter] = surprises.get((row, drafter), 0.0) + accepted - typical
        for drafter, sums in steps.items():
            self._step(drafter, sums)
        for place, count in counts.items():
            self.counts[:, place] = count
        for (row, drafter), surprise in surprises.items():
            for memory, keep in enumerate(_KEEP):
                column = memory * drafters + drafter
                moved = keep * records.item(row, column) + surprise
                records[row, column] = min(max(moved, -_MAX_RECORD), _MAX_RECORD)

    def _step(self, drafter: int, sums: Sequence[float]) -> None:
        """A Newton step of a drafter's weights: gradient [0, 1] and curvature [00, 01, 11] of a step's labels."""
        h00, h01, h11 = (_CURVATURE_FADE * self._curvature.item(i, drafter) + sums[2 + i] for i in range(3))
        self._curvature[:, drafter] = h00, h01, h11
        a, d = h00 + _CURVATURE_PRIOR, h11 + _CURVATURE_PRIOR
        determinant = a * d - h01 * h01
        moves = ((d * sums[0] - h01 * sums[1]) / determinant, (a * sums[1] - h01 * sums[0]) / determinant)
        low, high = _WEIGHT_RANGE
        for memory, move in enumerate(moves):
            self.weights[memory, drafter] = min(max(self.weights.item(memory, drafter) + move, low), high)

    def _typical(self, place: IntArray) -> FloatArray:
        seen, hits = self.counts[:, place]
        typical: FloatArray = (_PRIOR_WEIGHT * self._prior[place] + hits) / (_PRIOR_WEIGHT + seen)
        return typical

    def count(self, place: IntArray, accepted: BoolArray) -> None:
        """Fade the classes that get new evidence, and add it."""
        self._odds = None
        seen = np.bincount(place, minlength=self.counts.shape[1])
        self.counts *= np.where(seen > 0, _FADE, 1.0)
        self.counts[0] += seen
        self.counts[1] += np.bincount(place, accepted, minlength=self.counts.shape[1])


def offsets(records: FloatArray, weights: FloatArray) -> FloatArray:
    """What records add to the log-odds.  # [requests, MEMORIES, drafters] twice -> [requests, drafters]"""
    added = (records * weights).sum(axis=1)
    bounded: FloatArray = np.minimum(np.maximum(added, -_MAX_OFFSET), _MAX_OFFSET)
    return bounded
