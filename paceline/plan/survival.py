"""Online estimates of acceptance by drafter and confidence class.

A class's estimate is (prior + accepted) / (prior weight + seen), where old evidence fades, so that a drafter's
overconfidence and a change of topic show within dozens of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paceline.engine.types import FloatArray, NodeLabel

_FADE = 0.98
"""Weight of the evidence so far after each new label of the same class: a memory of about 50 labels."""
_PRIOR_WEIGHT = 4.0


class AcceptanceEstimates:
    """Acceptance probability of a node given that its parent was accepted.

    Args:
        priors: first guess by drafter.  # [num_keys] each
    """

    def __init__(self, priors: Mapping[str, FloatArray]) -> None:
        self._prior = {name: np.asarray(prior, dtype=np.float64) for name, prior in priors.items()}
        self._seen = {name: np.zeros_like(prior) for name, prior in self._prior.items()}
        self._accepted = {name: np.zeros_like(prior) for name, prior in self._prior.items()}

    def learn(self, labels: Sequence[NodeLabel]) -> None:
        """Count labels."""
        for label in labels:
            seen, accepted = self._seen[label.drafter], self._accepted[label.drafter]
            seen[label.key] = _FADE * seen[label.key] + 1.0
            accepted[label.key] = _FADE * accepted[label.key] + label.accepted

    def tables(self) -> dict[str, FloatArray]:
        """The estimates by drafter.  # [num_keys] each"""
        return {
            name: (_PRIOR_WEIGHT * prior + self._accepted[name]) / (_PRIOR_WEIGHT + self._seen[name])
            for name, prior in self._prior.items()
        }

    def rate(self, name: str) -> float:
        """Acceptance of the drafter's nodes over all classes, by how often each occurs."""
        weight = self._seen[name] + 1e-3
        return float((self.tables()[name] * weight).sum() / weight.sum())
