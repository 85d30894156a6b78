"""Online estimates of acceptance by drafter and confidence class.

A class's estimate is (prior + accepted) / (prior weight + seen), where old evidence fades, so that a drafter's
overconfidence and a change of topic show within dozens of steps. Evidence is kept per tenant salt, so that nobody can
read from timing what others generate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from paceline.arrays import FloatArray
from paceline.engine.types import NodeLabel, ScheduledBatch

_FADE = 0.98
"""Weight of the evidence so far after each new label of the same class: a memory of about 50 labels."""
_PRIOR_WEIGHT = 4.0
_MAX_TENANTS = 256


class AcceptanceEstimates:
    """Acceptance probability of a node given that its parent was accepted, apart for every tenant salt.

    Args:
        priors: first guess by drafter.  # [num_keys] each
    """

    def __init__(self, priors: Mapping[str, FloatArray]) -> None:
        self._prior = {name: np.asarray(prior, dtype=np.float64) for name, prior in priors.items()}
        self._evidence: OrderedDict[str, dict[str, FloatArray]] = OrderedDict()  # salt -> drafter -> [2, num_keys]

    def learn(self, labels: Sequence[NodeLabel]) -> None:
        """Count labels."""
        for label in labels:
            seen, accepted = self._of(label.salt)[label.drafter]
            seen[label.key] = _FADE * seen[label.key] + 1.0
            accepted[label.key] = _FADE * accepted[label.key] + label.accepted

    def tables(self, salt: str = "") -> dict[str, FloatArray]:
        """The estimates by drafter.  # [num_keys] each"""
        evidence = self._of(salt)
        return {
            name: (_PRIOR_WEIGHT * prior + evidence[name][1]) / (_PRIOR_WEIGHT + evidence[name][0])
            for name, prior in self._prior.items()
        }

    def of_batch(self, batch: ScheduledBatch) -> dict[str, dict[str, FloatArray]]:
        """The tables of every salt in the batch."""
        return {salt: self.tables(salt) for salt in {item.request.salt for item in batch.sampling}}

    def rate(self, name: str, salt: str = "") -> float:
        """Acceptance of the drafter's nodes over all classes, by how often each occurs."""
        weight = self._of(salt)[name][0] + 1e-3
        return float((self.tables(salt)[name] * weight).sum() / weight.sum())

    def _of(self, salt: str) -> dict[str, FloatArray]:
        if salt not in self._evidence:
            self._evidence[salt] = {name: np.zeros((2, len(prior))) for name, prior in self._prior.items()}
            if len(self._evidence) > _MAX_TENANTS:
                self._evidence.popitem(last=False)
        self._evidence.move_to_end(salt)
        return self._evidence[salt]
