"""What a run looked like over time, and how far its survival estimates could be trusted.

A series is a ratio of two sums in every time bin, so steps and scrapes of different weight are averaged rightly:
draft nodes over requests, accepted nodes over labelled nodes, committed tokens over seconds. A series of one drafter
is called `what/drafter`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray

MAX_BINS = 600
_SHORTEST_BIN = 0.1
"""Seconds."""
CLASSES = 20
"""Classes of predicted acceptance in a reliability diagram."""

Sample = Mapping[str, tuple[float, float]]
"""By series: what is added above and below the fraction bar."""


@dataclass(slots=True)
class Timeline:
    """Samples of one run; a bin holds `per_bin` of them on average, at least."""

    per_bin: int = 1
    times: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def add(self, seconds: float, sample: Sample) -> None:
        """Take in one sample, `seconds` after the start of the run."""
        self.times.append(seconds)
        self.samples.append(sample)

    def binned(self, seconds: float) -> dict[str, Any]:
        """At most `MAX_BINS` bins over a run of that many seconds.

        Returns:
            `seconds`: the middle of every bin; `series`: by name one value per bin, None where nothing was seen.
        """
        if not self.times:
            return {"seconds": [], "series": {}}
        most = math.ceil(len(self.times) / self.per_bin), math.ceil(seconds / _SHORTEST_BIN)
        count = max(1, min(MAX_BINS, *most))
        width = max(seconds, self.times[-1], 1e-9) / count
        sums: dict[str, FloatArray] = {}
        for at, sample in zip(self.times, self.samples, strict=True):
            place = min(int(at / width), count - 1)
            for name, pair in sample.items():
                sums.setdefault(name, np.zeros((count, 2)))[place] += pair
        return {
            "seconds": [round((i + 0.5) * width, 3) for i in range(count)],
            "series": {name: [_ratio(*pair) for pair in table.tolist()] for name, table in sorted(sums.items())},
        }


def _ratio(above: float, below: float) -> float | None:
    return round(above / below, 5) if below > 0 else None


@dataclass(slots=True)
class Reliability:
    """Predicted against observed acceptance, given that the parent was accepted.

    `tables[drafter]` has per class of prediction the nodes, the sum of their predictions, and the accepted ones.
    """

    tables: dict[str, FloatArray] = field(default_factory=dict)  # [3, CLASSES]

    def add(self, drafters: Sequence[str], index: IntArray, predicted: FloatArray, accepted: BoolArray) -> None:
        """Take in the labelled nodes of one step.

        Args:
            drafters: names.
            index: into the names.  # [nodes]
            predicted: acceptance as estimated beforehand.  # [nodes]
            accepted: what happened.  # [nodes]
        """
        place = np.minimum((predicted * CLASSES).astype(np.int64), CLASSES - 1)
        for number in np.unique(index):
            mine = index == number
            table = self.tables.setdefault(drafters[number], np.zeros((3, CLASSES)))
            np.add.at(table[0], place[mine], 1.0)
            np.add.at(table[1], place[mine], predicted[mine])
            np.add.at(table[2], place[mine], accepted[mine].astype(np.float64))

    def merge(self, other: Reliability) -> None:
        """Add what another run saw."""
        for name, table in other.tables.items():
            self.tables[name] = self.tables.get(name, 0) + table

    def diagrams(self) -> dict[str, Any]:
        """By drafter: one entry per class that occurred, and the expected calibration error."""
        return {name: _diagram(table) for name, table in sorted(self.tables.items())}


def _diagram(table: FloatArray) -> dict[str, Any]:
    nodes, predicted, accepted = table[:, table[0] > 0]
    error = float(np.abs(predicted - accepted).sum() / nodes.sum())
    return {
        "nodes": nodes.astype(int).tolist(),
        "predicted": np.round(predicted / nodes, 4).tolist(),
        "observed": np.round(accepted / nodes, 4).tolist(),
        "calibration_error": round(error, 4),
    }
