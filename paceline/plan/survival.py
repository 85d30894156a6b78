"""Online estimates of acceptance: by drafter and confidence class, and by request.

A class's estimate is (prior + accepted) / (prior weight + seen). Old evidence fades with every step that brings new
evidence for the class, so a drafter's overconfidence and a change of topic show within dozens of steps, and a busy
batch makes the estimate sharper rather than shorter-lived. What distinguishes a request from the others of its kind
is one number per drafter, added to the log-odds of all classes and pulled towards what its own labels say (online
logistic regression with a fading intercept).

Evidence is kept per tenant salt, so that nobody can read from timing what others generate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.engine.request import Request
from paceline.engine.types import NodeLabels, StepStats
from paceline.plan.requests import FIRST_OFFSET, RequestTable

_FADE = 0.98
"""Weight of a class's evidence after each step that labels it: a memory of about 50 steps."""
_PRIOR_WEIGHT = 4.0
_PULL = 0.3
_OFFSET_FADE = 0.95
_MAX_OFFSET = 3.0
_MAX_TENANTS = 256
_MAX_DEPTH = 32
_CERTAIN = 1e-9
"""Estimates stay this far from 0 and 1."""


@dataclass(eq=False, slots=True)
class _Evidence:
    """Fading counts of one tenant: [seen, accepted] by class, and by depth."""

    classes: FloatArray  # [2, all drafters' classes]
    depths: FloatArray  # [2, drafters, _MAX_DEPTH]
    odds: FloatArray | None = field(default=None)  # [all drafters' classes], until the next label


class AcceptanceEstimates:
    """Acceptance probability of a node given that its parent was accepted.

    Args:
        priors: first guess by drafter.  # [num_keys] each
    """

    def __init__(self, priors: Mapping[str, FloatArray]) -> None:
        self.names = tuple(priors)
        self._index = {name: i for i, name in enumerate(priors)}
        self.requests = RequestTable(len(priors))
        self._prior = np.concatenate([np.asarray(p, dtype=np.float64) for p in priors.values()] or [np.empty(0)])
        ends = np.cumsum([len(p) for p in priors.values()], dtype=np.int64)
        self._start = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self._slices = {
            name: slice(int(start), int(end)) for name, start, end in zip(priors, self._start, ends, strict=True)
        }
        self._evidence: OrderedDict[str, _Evidence] = OrderedDict()

    def of_batch(self, requests: Sequence[Request], rows: IntArray, names: Iterable[str]) -> dict[str, FloatArray]:
        """The estimates of some drafters.  # [len(requests), num_keys] each"""
        factors = np.exp(self.requests.data[rows, FIRST_OFFSET:])  # [requests, drafters]
        odds = self._odds_of_batch(requests)  # [requests or 1, classes]
        found: dict[str, FloatArray] = {}
        for name in names:
            i = self._index[name]
            mine = odds[:, self._slices[name]] * factors[:, i : i + 1]
            found[name] = mine / (1.0 + mine)
        return found

    def by_depth(self, name: str, requests: Sequence[Request], rows: IntArray, depth: int) -> FloatArray:
        """Survival of a chain's nodes, whatever their classes will be.  # [len(requests), depth]"""
        i = self._index[name]
        factors = np.exp(self.requests.data[rows, FIRST_OFFSET + i])  # [requests]
        typical = np.clip(self._prior[self._slices[name]].mean(), _CERTAIN, 1.0 - _CERTAIN)
        chances = []
        for request in requests if len({r.salt for r in requests}) > 1 else requests[:1]:
            seen, accepted = self._of(request.salt).depths[:, i, :depth]
            chances.append((_PRIOR_WEIGHT * typical + accepted) / (_PRIOR_WEIGHT + seen))
        odds = _odds(np.array(chances)) * factors[:, None]
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
        columns = (drafter, labels.key, labels.depth, labels.accepted)
        salts = {request.salt for request in stats.requests}
        if len(salts) == 1:
            self._count(self._of(salts.pop()), *columns)
        else:
            number = {salt: i for i, salt in enumerate(salts)}
            by_request = np.array([number[request.salt] for request in stats.requests])[labels.request]
            for salt in salts:
                mine = by_request == number[salt]
                self._count(self._of(salt), *(column[mine] for column in columns))
        self._pull(stats.requests, drafter, labels)

    def forget(self, request: Request) -> None:
        """Drop a finished request's own number."""
        self.requests.forget(request)

    def _count(
        self, evidence: _Evidence, drafter: IntArray, key: IntArray, depth: IntArray, accepted: BoolArray
    ) -> None:
        place = self._start[drafter] + key
        _fade_and_add(evidence.classes, place, accepted)
        flat = evidence.depths.reshape(2, -1)
        _fade_and_add(flat, drafter * _MAX_DEPTH + np.minimum(depth, _MAX_DEPTH) - 1, accepted)
        evidence.odds = None

    def _pull(self, requests: Sequence[Request], drafter: IntArray, labels: NodeLabels) -> None:
        """Move each request's number along the gradient of its labels' likelihood."""
        drafters = len(self.names)
        place = labels.request * drafters + drafter
        error = np.bincount(place, labels.accepted - labels.predicted, minlength=len(requests) * drafters)
        touched = (np.bincount(place, minlength=len(error)) > 0).reshape(len(requests), drafters)
        rows = self.requests.known(requests)
        if (rows < 0).any():
            keep = rows >= 0
            rows, touched, error = rows[keep], touched[keep], error.reshape(-1, drafters)[keep]
        offset = self.requests.data[rows, FIRST_OFFSET:]
        moved = np.clip(_OFFSET_FADE * offset + _PULL * error.reshape(-1, drafters), -_MAX_OFFSET, _MAX_OFFSET)
        self.requests.data[rows, FIRST_OFFSET:] = np.where(touched, moved, offset)

    def _odds_of_batch(self, requests: Sequence[Request]) -> FloatArray:
        salts = [request.salt for request in requests]
        if len(set(salts)) == 1:
            return self._odds(salts[0])[None]
        return np.stack([self._odds(salt) for salt in salts])

    def _odds(self, salt: str) -> FloatArray:
        evidence = self._of(salt)
        if evidence.odds is None:
            seen, accepted = evidence.classes
            evidence.odds = _odds((_PRIOR_WEIGHT * self._prior + accepted) / (_PRIOR_WEIGHT + seen))
        return evidence.odds

    def _of(self, salt: str) -> _Evidence:
        if salt not in self._evidence:
            self._evidence[salt] = _Evidence(
                np.zeros((2, len(self._prior))), np.zeros((2, len(self.names), _MAX_DEPTH))
            )
            if len(self._evidence) > _MAX_TENANTS:
                self._evidence.popitem(last=False)
        self._evidence.move_to_end(salt)
        return self._evidence[salt]


def _fade_and_add(counts: FloatArray, place: IntArray, accepted: BoolArray) -> None:
    """Fade the entries of `counts` that get new evidence, and add it.  # [2, n]"""
    seen = np.bincount(place, minlength=counts.shape[1])
    counts *= np.where(seen > 0, _FADE, 1.0)
    counts[0] += seen
    counts[1] += np.bincount(place, accepted, minlength=counts.shape[1])


def _odds(chance: FloatArray) -> FloatArray:
    clipped = np.clip(chance, _CERTAIN, 1.0 - _CERTAIN)
    return np.asarray(clipped / (1.0 - clipped))
