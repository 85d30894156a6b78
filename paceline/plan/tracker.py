"""Follows a few numbers that explain noisy measurements: a Kalman filter that outliers do not disturb."""

from __future__ import annotations

import math

import numpy as np

from paceline.arrays import FloatArray

_SURPRISE = 3.0
"""Standard deviations beyond which a measurement is cut back to them."""
_RUN = 3
"""Surprises in a row, on the same side, that are no outliers but news ..."""
_NEWS = 1000.0
"""... after which the values are taken to have drifted for so many steps."""


class Tracker:
    """`measured = row @ values + noise`, the values drifting slowly.

    Args:
        values: what is believed at first.  # [n]
        spread: its covariance.  # [n, n]
        keep: share of each value that survives a step; the rest goes back to what was believed at first, so that
            what is not measured any more is forgotten.  # [n]
    """

    def __init__(self, values: FloatArray, spread: FloatArray, keep: FloatArray | None = None) -> None:
        self.values = values.copy()
        self._spread = np.array(spread)
        self._diagonal = self._spread.reshape(-1)[:: len(values) + 1]  # a view
        self._keep = keep
        if keep is not None:
            both = np.outer(keep, keep)
            self._kept, self._first_values = both, (1.0 - keep) * values
            self._first_spread = (1.0 - both) * spread
        self._run = 0

    def learn(self, row: FloatArray, measured: float, noise: float, drift: FloatArray) -> float:
        """Take in a measurement.

        Args:
            row: how the values add up to it.  # [n]
            measured: the measurement.
            noise: its variance.
            drift: variance that each value has gained since the last one, in units of `noise`.  # [n]

        Returns:
            Squared error over the variance that was expected of it, an outlier cut back: 1 on average.
        """
        if self._keep is not None:
            self.values *= self._keep
            self.values += self._first_values
            self._spread *= self._kept
            self._spread += self._first_spread
        self._diagonal += noise * drift
        column = self._spread @ row
        variance = float(row @ column) + noise
        error = measured - float(row @ self.values)
        limit = _SURPRISE * math.sqrt(variance)
        if abs(error) > limit:
            side = 1 if error > 0 else -1
            self._run = self._run + side if self._run * side > 0 else side
            if abs(self._run) >= _RUN:
                self._diagonal += _NEWS * noise * drift
                column = self._spread @ row
                variance = float(row @ column) + noise
            error = side * min(abs(error), _SURPRISE * math.sqrt(variance))
        else:
            self._run = 0
        gain = column / variance
        self.values += gain * error
        self._spread -= gain[:, None] * column
        return error * error / variance

    def keep_positive(self) -> None:
        """Raise negative values to 0, and move the others as far as their sums with them are known."""
        for _ in range(len(self.values)):
            worst = int(self.values.argmin())
            if self.values[worst] >= 0.0:
                return
            self.values -= self._spread[worst] * (self.values[worst] / self._diagonal[worst])
            self.values[worst] = 0.0
        np.maximum(self.values, 0.0, out=self.values)
