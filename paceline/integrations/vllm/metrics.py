"""Counters on vLLM's own `/metrics`.

The scheduler lives in the engine's process, `/metrics` in the API server's. prometheus-client joins them through files
when `PROMETHEUS_MULTIPROC_DIR` is set before vLLM starts: `paceline vllm serve` does that. Without it the same numbers
are counted, and seen only where both are one process.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from paceline.engine.types import StepStats
    from paceline.integrations.vllm.controller import Result, Step

_FLUSH_EVERY = 32
"""Steps whose counts are gathered before they are written: a write to shared files takes microseconds."""

NAMES = {
    "paceline:chosen_length": "Request steps by draft tokens verified.",
    "paceline:steps": "Decode steps.",
    "paceline:steps_at_zero": "Decode steps in which nobody looked ahead.",
    "paceline:drafts_trimmed": "Draft tokens that were not worth their verification.",
    "paceline:drafts_verified": "Draft tokens verified; padding is not counted.",
    "paceline:drafts_accepted": "Draft tokens accepted.",
    "paceline:drafts_expected": "Draft tokens that the estimates expected to be accepted.",
    "paceline:errors": "Steps left to vLLM alone because of an exception.",
}
PRICE = "paceline:slot_price"
_PRICE_HELP = "Survival that a draft token needs to be worth verifying (1: none is)."


class Meter:
    """Counts steps, and writes them now and then.

    Args:
        most: largest length.
    """

    def __init__(self, most: int) -> None:
        self._lengths = np.zeros(most + 1, dtype=np.int64)
        self._counts: dict[str, float] = dict.fromkeys(NAMES, 0.0)
        self._price: float | None = None
        self._steps = 0
        self._made = _instruments()

    def count(self, step: Step, result: Result, stats: StepStats | None) -> None:
        """Take in a step."""
        if not step.requests:
            return
        counts = self._counts
        counts["paceline:steps"] += 1
        self._price = step.price
        if any(step.drafted):
            kept = step.kept
            verified = sum(kept)
            counts["paceline:drafts_trimmed"] += max(sum(step.drafted) - verified, 0)
            counts["paceline:drafts_verified"] += verified
            counts["paceline:steps_at_zero"] += not verified
            self._lengths += np.bincount(np.minimum(kept, len(self._lengths) - 1), minlength=len(self._lengths))
            if verified:
                counts["paceline:drafts_accepted"] += sum(result.committed) - len(result.committed)
                if stats is not None:
                    counts["paceline:drafts_expected"] += sum(stats.gains.values())
        else:
            counts["paceline:steps_at_zero"] += 1
            self._lengths[0] += len(step.requests)
        self._steps += 1
        if self._steps % _FLUSH_EVERY == 0:
            self.flush()

    def failed(self) -> None:
        """Count an exception."""
        self._counts["paceline:errors"] += 1
        self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        lengths = self._made["paceline:chosen_length"]
        for length in self._lengths.nonzero()[0].tolist():
            lengths.labels(length=str(length)).inc(int(self._lengths[length]))
        self._lengths[:] = 0
        for name, value in self._counts.items():
            if value:
                self._made[name].inc(value)
                self._counts[name] = 0.0
        if self._price is not None:
            self._made[PRICE].set(self._price)


@cache
def _instruments() -> dict[str, Any]:
    """Made once for a process: the registry takes every name only once."""
    from prometheus_client import Counter, Gauge

    made: dict[str, Any] = {
        name: Counter(name, text, ["length"] if name == "paceline:chosen_length" else [])
        for name, text in NAMES.items()
    }
    made[PRICE] = Gauge(PRICE, _PRICE_HELP, multiprocess_mode="mostrecent")
    return made
