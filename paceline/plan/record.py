"""How a request's own record bears on its acceptance: online logistic regression on what surprised its class.

A request's record, for every drafter, is how far its labels were from what is typical of their classes, summed with
two memories: the latest steps and the last dozens. What these two numbers are worth in log-odds differs from drafter
to drafter (a copier that has just been right stays right; a good draft model says it all in its classes), so their
weights are learned from all requests of a tenant, by Newton steps along the likelihood of the labels.
"""

from __future__ import annotations

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray

MEMORIES = 2
_KEEP = np.array([0.2, 0.95])
"""Share of the record that survives a labelled step, by memory."""
_FIRST_WEIGHT = 0.1
_WEIGHT_RANGE = (-0.2, 2.0)
_CURVATURE_FADE = 0.995
_CURVATURE_PRIOR = 30.0
"""Curvature of the likelihood, in labels times variance, that the first weights count for."""
_MAX_RECORD = 8.0
_MAX_OFFSET = 3.0


class RecordWeights:
    """One tenant's weights.

    Args:
        drafters: how many there are.
    """

    def __init__(self, drafters: int) -> None:
        self._weights = np.full((drafters, MEMORIES), _FIRST_WEIGHT)
        self._curvature = np.zeros((drafters, MEMORIES, MEMORIES))

    def offsets(self, records: FloatArray) -> FloatArray:
        """What to add to the log-odds.  # [requests, drafters, MEMORIES] -> [requests, drafters]"""
        added: FloatArray = np.clip((records * self._weights).sum(axis=-1), -_MAX_OFFSET, _MAX_OFFSET)
        return added

    def learn(self, drafter: IntArray, record: FloatArray, predicted: FloatArray, accepted: BoolArray) -> None:
        """Take in labels.

        Args:
            drafter: who drafted.  # [n]
            record: the request's record with that drafter before the label.  # [n, MEMORIES]
            predicted: the acceptance that was expected.  # [n]
            accepted: the label.  # [n]
        """
        error, spread = accepted - predicted, predicted * (1.0 - predicted)
        for i in np.flatnonzero(np.bincount(drafter)).tolist():
            mine = drafter == i
            x = record[mine]
            self._curvature[i] = _CURVATURE_FADE * self._curvature[i] + (x * spread[mine, None]).T @ x
            step = np.linalg.solve(self._curvature[i] + _CURVATURE_PRIOR * np.eye(MEMORIES), error[mine] @ x)
            self._weights[i] = np.clip(self._weights[i] + step, *_WEIGHT_RANGE)


def updated(records: FloatArray, surprise: FloatArray, touched: BoolArray) -> FloatArray:
    """Records after a step.

    Args:
        records: before it.  # [requests, drafters, MEMORIES]
        surprise: sum of label minus what is typical of its class.  # [requests, drafters]
        touched: where there was a label.  # [requests, drafters]
    """
    moved = np.clip(_KEEP * records + surprise[..., None], -_MAX_RECORD, _MAX_RECORD)
    result: FloatArray = np.where(touched[..., None], moved, records)
    return result
