"""How long a decode step takes as a function of the tokens in its forward.

Measured once at start (the fastest of a few runs per size, linear in between), then shifted online per number of
requests, since contexts grow and machines are shared. Only differences between sizes decide how far to look ahead.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paceline.arrays import FloatArray

PROFILE_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
_BLEND = 0.1


class StepTime:
    """The measured table and its corrections.

    Args:
        seconds: step seconds by tokens in the forward; at least two sizes.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._sizes = np.array(sorted(seconds), dtype=np.float64)
        self._seconds = np.array([seconds[int(n)] for n in self._sizes])
        middle = min(len(self._sizes) // 2, len(self._sizes) - 2)
        slope = (self._seconds[-1] - self._seconds[middle]) / (self._sizes[-1] - self._sizes[middle])
        self._slope = max(float(slope), 1e-9)
        self._shift: dict[int, float] = {}

    def at(self, num_tokens: FloatArray, num_requests: int) -> FloatArray:
        """Expected seconds of steps with `num_tokens` tokens."""
        beyond = np.maximum(num_tokens - self._sizes[-1], 0.0) * self._slope
        table = np.interp(num_tokens, self._sizes, self._seconds)
        result: FloatArray = table + beyond + self._shift.get(num_requests, 0.0)
        return result

    def learn(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """Take in a measured decode step; single outliers (a pause of the machine) are clipped."""
        expected = float(self.at(np.array([float(num_tokens)]), num_requests)[0])
        error = min(max(seconds - expected, -0.5 * expected), 0.5 * expected)
        shift = self._shift.get(num_requests)
        self._shift[num_requests] = error if shift is None else shift + _BLEND * error
