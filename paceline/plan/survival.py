"""Online estimates of acceptance: by drafter and confidence class, corrected by each request's own record.

`evidence.py` says how they are learned. Evidence is kept per tenant salt: what one tenant's text says about acceptance
never reaches another's estimates. (Step times, goodput and which drafters pay are those of the whole machine.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.engine.request import Request
from paceline.engine.types import StepStats
from paceline.plan.evidence import MEMORIES, Evidence, Labels, offsets
from paceline.plan.requests import RequestTable

_MAX_TENANTS = 256
_MAX_DEPTH = 32
_FAR = 1 << 12
"""Deeper than any tree."""


class _WhenRead(Mapping[str, FloatArray]):
    """A mapping that is made when its values are first read."""

    def __init__(self, names: tuple[str, ...], make: Callable[[], Mapping[str, FloatArray]]) -> None:
        self._names, self._make = names, make
        self._made: Mapping[str, FloatArray] | None = None

    def __getitem__(self, name: str) -> FloatArray:
        if name not in self._names:
            raise KeyError(name)
        if self._made is None:
            self._made = self._make()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class AcceptanceEstimates:
    """Acceptance probability of a node given that its parent was accepted.

    Args:
        priors: first guess by drafter.  # [num_keys] each
        by_depth: drafters for which acceptance by depth alone is kept as well (those that are planned before they
            draft).
    """

    def __init__(self, priors: Mapping[str, FloatArray], by_depth: Iterable[str] = ()) -> None:
        self.names = tuple(priors)
        self.requests = RequestTable(MEMORIES * len(priors))
        self._index = {name: i for i, name in enumerate(priors)}
        deep = tuple(by_depth)
        parts = [np.asarray(prior, dtype=np.float64) for prior in priors.values()]
        depths = [np.full(_MAX_DEPTH, np.asarray(priors[name]).mean()) for name in deep]
        self._prior = np.concatenate([*parts, *depths, np.empty(0)])
        starts = np.cumsum([0, *(len(part) for part in (*parts, *depths))]).tolist()
        self._start = np.array(starts[: len(parts)], dtype=np.int64)
        self._slices = {name: slice(*starts[i : i + 2]) for i, name in enumerate(priors)}
        self._depth_start = {name: starts[len(parts) + i] for i, name in enumerate(deep)}
        self._num_classes = starts[len(parts)]
        self._drafter_of_class = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self._evidence: OrderedDict[str, Evidence] = OrderedDict()

    def of_batch(self, requests: Sequence[Request], rows: IntArray, names: Iterable[str]) -> Mapping[str, FloatArray]:
        """The estimates of some drafters, made when first read, before the next `learn`: often nobody drafts anything.

        # [len(requests), num_keys] each
        """
        return _WhenRead(tuple(names), lambda: self._chances(requests, rows))

    def _chances(self, requests: Sequence[Request], rows: IntArray) -> dict[str, FloatArray]:
        salts = _salts(requests)
        odds = self._odds(salts)[:, : self._num_classes]
        odds = odds * self._factors(salts, rows).take(self._drafter_of_class, axis=1)
        chances = odds / (1.0 + odds)
        return {name: chances[:, place] for name, place in self._slices.items()}

    def by_depth(self, name: str, requests: Sequence[Request], rows: IntArray, depth: int) -> FloatArray:
        """Probability that some node of each level is accepted, whatever its class.  # [len(requests), depth]"""
        salts = _salts(requests)
        deep = self._depth_start[name] + np.minimum(np.arange(depth), _MAX_DEPTH - 1)
        i = self._index[name]
        odds = self._odds(salts)[:, deep] * self._factors(salts, rows)[:, i : i + 1]
        return np.asarray(np.cumprod(odds / (1.0 + odds), axis=1))

    def tables(self, salt: str = "") -> dict[str, FloatArray]:
        """The estimates of a tenant's new request.  # [num_keys] each"""
        odds = self._of(salt).odds()
        return {name: odds[part] / (1.0 + odds[part]) for name, part in self._slices.items()}

    def learn(self, stats: StepStats) -> None:
        """Count a step's labels. Those of requests that were never planned for are left out."""
        labels = stats.labels
        if not len(labels):
            return
        drafter = labels.drafter
        if labels.names != self.names:
            drafter = np.array([self._index[name] for name in labels.names])[drafter]
        rows = self.requests.rows(stats.requests)
        place = self._start[drafter] + labels.key
        chosen = Labels(drafter, place, labels.request, labels.predicted, labels.accepted)
        salts = _salts(stats.requests)
        if len(salts) == 1 and rows.min() >= 0:
            self._learn(salts[0], chosen, labels.depth, rows)
            return
        number = {salt: i for i, salt in enumerate(dict.fromkeys(salts))}
        tenant = np.array([number[salt] for salt in salts]) if len(salts) > 1 else np.zeros(len(rows), dtype=np.int64)
        tenant[rows < 0] = -1
        of_label = tenant[labels.request]
        order = of_label.argsort(kind="stable")
        bounds = np.searchsorted(of_label[order], np.arange(len(number) + 1))
        for salt, i in number.items():
            mine = order[bounds[i] : bounds[i + 1]]
            if len(mine):
                own, request = np.unique(labels.request[mine], return_inverse=True)
                part = chosen.take(mine, request)
                self._learn(salt, part, labels.depth[mine], rows[own])

    def forget(self, request: Request) -> None:
        """Drop a finished request's record."""
        self.requests.forget(request)

    def _learn(self, salt: str, labels: Labels, depth: IntArray, rows: IntArray) -> None:
        evidence = self._of(salt)
        evidence.learn(labels, self.requests.records, rows)
        for name, start in self._depth_start.items():
            own = labels.drafter == self._index[name]
            if not own.any():
                continue
            level, accepted = _levels(labels.request[own], depth[own], labels.accepted[own])
            evidence.count(start + np.minimum(level, _MAX_DEPTH) - 1, accepted)

    def _factors(self, salts: Sequence[str], rows: IntArray) -> FloatArray:
        """What each request's record multiplies its odds by.  # [requests, drafters]"""
        records = self.requests.records[rows].reshape(len(rows), MEMORIES, len(self.names))
        if len(salts) == 1:
            weights = self._of(salts[0]).weights
        else:
            weights = np.stack([self._of(salt).weights for salt in salts])
        return np.asarray(np.exp(offsets(records, weights)))

    def _odds(self, salts: Sequence[str]) -> FloatArray:
        """Odds by class and depth.  # [len(salts), all]"""
        if len(salts) == 1:
            return self._of(salts[0]).odds()[None]
        return np.stack([self._of(salt).odds() for salt in salts])

    def _of(self, salt: str) -> Evidence:
        found = self._evidence.get(salt)
        if found is None:
            found = self._evidence[salt] = Evidence(self._prior, len(self.names))
            if len(self._evidence) > _MAX_TENANTS:
                self._evidence.popitem(last=False)
        elif len(self._evidence) > 1:
            self._evidence.move_to_end(salt)
        return found


def _levels(request: IntArray, depth: IntArray, accepted: BoolArray) -> tuple[IntArray, BoolArray]:
    """The labelled levels of every request's tree, and whether one of the siblings there was accepted."""
    places, index = np.unique(request * (_FAR + 1) + np.minimum(depth, _FAR), return_inverse=True)
    return places % (_FAR + 1), np.bincount(index, accepted, minlength=len(places)) > 0.0


def _salts(requests: Sequence[Request]) -> list[str]:
    """Each request's tenant; only one entry if it is the same for all."""
    salts = [request.salt for request in requests]
    return salts[:1] if len(salts) == 1 or len(set(salts)) == 1 else salts
