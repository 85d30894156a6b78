"""Online estimates of acceptance: by drafter and confidence class, corrected by each request's own record.

A class's estimate is (prior + accepted) / (prior weight + seen). Old evidence fades with every step that brings new
evidence for the class, so a drafter's overconfidence and a change of topic show within dozens of steps, and a busy
batch makes the estimate sharper rather than shorter-lived. What distinguishes a request from others is `record.py`.

Evidence is kept per tenant salt, so that nobody can read from timing what others generate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.engine.request import Request
from paceline.engine.types import NodeLabels, StepStats
from paceline.plan.record import MEMORIES, RecordWeights, updated
from paceline.plan.requests import FIRST_OFFSET, RequestTable

_FADE = 0.98
"""Weight of a class's evidence after each step that labels it: a memory of about 50 steps."""
_PRIOR_WEIGHT = 4.0
_MAX_TENANTS = 256
_MAX_DEPTH = 32
_CERTAIN = 1e-9
"""Estimates stay this far from 0 and 1."""


class _Evidence:
    """What is known of one tenant: fading counts [seen, accepted] by class and by depth, and the records' weights."""

    def __init__(self, classes: int, drafters: int) -> None:
        self.classes = np.zeros((2, classes))
        self.depths = np.zeros((2, drafters, _MAX_DEPTH))
        self.weights = RecordWeights(drafters)
        self.odds: FloatArray | None = None  # [classes], until the next label


class AcceptanceEstimates:
    """Acceptance probability of a node given that its parent was accepted.

    Args:
        priors: first guess by drafter.  # [num_keys] each
    """

    def __init__(self, priors: Mapping[str, FloatArray]) -> None:
        self.names = tuple(priors)
        self.requests = RequestTable(MEMORIES * len(priors))
        self._index = {name: i for i, name in enumerate(priors)}
        self._prior = np.concatenate([np.asarray(p, dtype=np.float64) for p in priors.values()] or [np.empty(0)])
        ends = np.cumsum([len(p) for p in priors.values()], dtype=np.int64)
        self._start = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self._slices = {
            name: slice(int(start), int(end)) for name, start, end in zip(priors, self._start, ends, strict=True)
        }
        self._evidence: OrderedDict[str, _Evidence] = OrderedDict()

    def of_batch(self, requests: Sequence[Request], rows: IntArray, names: Iterable[str]) -> dict[str, FloatArray]:
        """The estimates of some drafters.  # [len(requests), num_keys] each"""
        salts = _salts(requests)
        factors = self._factors(salts, rows)
        odds = np.stack([self._odds(salt) for salt in salts])  # [requests or 1, classes]
        found: dict[str, FloatArray] = {}
        for name in names:
            i = self._index[name]
            mine = odds[:, self._slices[name]] * factors[:, i : i + 1]
            found[name] = mine / (1.0 + mine)
        return found

    def by_depth(self, name: str, requests: Sequence[Request], rows: IntArray, depth: int) -> FloatArray:
        """Survival of a chain's nodes, whatever their classes will be.  # [len(requests), depth]"""
        i = self._index[name]
        salts = _salts(requests)
        typical = np.clip(self._prior[self._slices[name]].mean(), _CERTAIN, 1.0 - _CERTAIN)
        deep = np.minimum(np.arange(depth), _MAX_DEPTH - 1)
        counts = np.stack([self._of(salt).depths[:, i, deep] for salt in salts])  # [requests or 1, 2, depth]
        odds = _odds((_PRIOR_WEIGHT * typical + counts[:, 1]) / (_PRIOR_WEIGHT + counts[:, 0]))
        odds = odds * self._factors(salts, rows)[:, i : i + 1]
        return np.asarray(np.cumprod(odds / (1.0 + odds), axis=1))

    def tables(self, salt: str = "") -> dict[str, FloatArray]:
        """The estimates of a tenant's new request.  # [num_keys] each"""
        odds = self._odds(salt)
        return {name: odds[part] / (1.0 + odds[part]) for name, part in self._slices.items()}

    def learn(self, stats: StepStats) -> None:
        """Count a step's labels."""
        labels = stats.labels
        if not len(labels):
            return
        drafter = np.array([self._index[name] for name in labels.names])[labels.drafter]
        rows = self.requests.known(stats.requests)
        typical = np.empty(len(labels))
        salts = _salts(stats.requests)
        everyone = len(salts) == 1
        for salt in dict.fromkeys(salts):
            mine = slice(None) if everyone else np.array([s == salt for s in salts])[labels.request]
            typical[mine] = self._learn(salt, labels, drafter, rows, mine)
        surprise: FloatArray = labels.accepted - typical
        self._record(rows, labels.request * len(self.names) + drafter, surprise)

    def forget(self, request: Request) -> None:
        """Drop a finished request's record."""
        self.requests.forget(request)

    def _learn(
        self, salt: str, labels: NodeLabels, drafter: IntArray, rows: IntArray, mine: slice | BoolArray
    ) -> FloatArray:
        """Count one tenant's labels; what was typical of their classes before.  # [labels of this tenant]"""
        evidence = self._of(salt)
        drafter, accepted = drafter[mine], labels.accepted[mine]
        record = self._records(rows)[labels.request[mine], drafter]
        evidence.weights.learn(drafter, record, labels.predicted[mine], accepted)
        place = self._start[drafter] + labels.key[mine]
        seen, hits = evidence.classes[:, place]
        typical: FloatArray = (_PRIOR_WEIGHT * self._prior[place] + hits) / (_PRIOR_WEIGHT + seen)
        _fade_and_add(evidence.classes, place, accepted)
        depth = np.minimum(labels.depth[mine], _MAX_DEPTH) - 1
        _fade_and_add(evidence.depths.reshape(2, -1), drafter * _MAX_DEPTH + depth, accepted)
        evidence.odds = None
        return typical

    def _record(self, rows: IntArray, place: IntArray, surprise: FloatArray) -> None:
        """Add surprises to the requests' records; `place` is request * drafters + drafter."""
        shape = (len(rows), len(self.names))
        size = shape[0] * shape[1]
        touched = np.bincount(place, minlength=size).reshape(shape) > 0
        added = np.bincount(place, surprise, minlength=size).astype(np.float64).reshape(shape)
        new = updated(self._records(rows), added, touched)
        planned = rows >= 0
        self.requests.data[rows[planned], FIRST_OFFSET:] = new[planned].reshape(-1, MEMORIES * shape[1])

    def _records(self, rows: IntArray) -> FloatArray:
        return self.requests.data[rows, FIRST_OFFSET:].reshape(len(rows), len(self.names), MEMORIES)

    def _factors(self, salts: Sequence[str], rows: IntArray) -> FloatArray:
        """What each request's record multiplies its odds by.  # [requests, drafters]"""
        records = self._records(rows)
        if len(salts) == 1:
            return np.asarray(np.exp(self._of(salts[0]).weights.offsets(records)))
        each = [self._of(salt).weights.offsets(record) for salt, record in zip(salts, records, strict=True)]
        return np.exp(np.stack(each))

    def _odds(self, salt: str) -> FloatArray:
        evidence = self._of(salt)
        if evidence.odds is None:
            seen, accepted = evidence.classes
            evidence.odds = _odds((_PRIOR_WEIGHT * self._prior + accepted) / (_PRIOR_WEIGHT + seen))
        return evidence.odds

    def _of(self, salt: str) -> _Evidence:
        if salt not in self._evidence:
            self._evidence[salt] = _Evidence(len(self._prior), len(self.names))
            if len(self._evidence) > _MAX_TENANTS:
                self._evidence.popitem(last=False)
        self._evidence.move_to_end(salt)
        return self._evidence[salt]


def _salts(requests: Sequence[Request]) -> list[str]:
    """Each request's tenant; only one entry if it is the same for all."""
    salts = [request.salt for request in requests]
    return salts[:1] if len(set(salts)) == 1 else salts


def _fade_and_add(counts: FloatArray, place: IntArray, accepted: BoolArray) -> None:
    """Fade the entries of `counts` that get new evidence, and add it.  # [2, n]"""
    seen = np.bincount(place, minlength=counts.shape[1])
    counts *= np.where(seen > 0, _FADE, 1.0)
    counts[0] += seen
    counts[1] += np.bincount(place, accepted, minlength=counts.shape[1])


def _odds(chance: FloatArray) -> FloatArray:
    clipped = np.clip(chance, _CERTAIN, 1.0 - _CERTAIN)
    return np.asarray(clipped / (1.0 - clipped))
