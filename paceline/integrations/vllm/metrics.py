"""Counters on vLLM's own `/metrics`.

The scheduler lives in the engine's process, `/metrics` in the API server's. prometheus-client joins them through files
when `PROMETHEUS_MULTIPROC_DIR` is set before vLLM starts: `paceline vllm serve` does that. Without it the same numbers
are counted, and seen only where both are one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.engine.types import StepStats
    from paceline.integrations.vllm.step import Step

_FLUSH_EVERY = 32
"""Steps whose counts are gathered before they are written: a write to shared files takes microseconds."""

NAMES = {
    "paceline:chosen_length": "Request steps by draft tokens verified.",
    "paceline:steps": "Decode steps.",
    "paceline:steps_at_zero": "Decode steps in which nobody looked ahead.",
    "paceline:drafts_trimmed": "Draft tokens that were not worth their verification (in steps planned anew).",
    "paceline:drafts_verified": "Draft tokens verified.",
    "paceline:drafts_accepted": "Draft tokens accepted.",
    "paceline:planned_expected": "Draft tokens that were expected to be accepted in steps planned anew.",
    "paceline:planned_accepted": "Draft tokens that were accepted in those steps.",
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
        self._lengths = [0] * (most + 1)
        self._counts: dict[str, float] = dict.fromkeys(NAMES, 0.0)
        self._price: float | None = None
        self._steps = 0
        self._made = _instruments()

    def count(self, step: Step | None, drafts: Mapping[str, Sequence[int]], sampled: Sequence[Sequence[int]]) -> None:
        """Take in a step's draft tokens, as they were verified, and what was sampled."""
        counts, lengths = self._counts, self._lengths
        counts["paceline:steps"] += 1
        if drafts:
            sizes = [*map(len, drafts.values())]
            for length, times in Counter(sizes).items():
                lengths[length] += times
            counts["paceline:drafts_verified"] += sum(sizes)
            lengths[0] += max(len(sampled) - len(drafts), 0)
            counts["paceline:drafts_accepted"] += max(sum(map(len, sampled)) - len(sampled), 0)
        else:
            counts["paceline:steps_at_zero"] += 1
            lengths[0] += len(sampled)
        if step is not None:
            self._price = step.price
            counts["paceline:drafts_trimmed"] += max(sum(step.drafted) - sum(step.kept), 0)
        self._steps += 1
        if self._steps % _FLUSH_EVERY == 0:
            self.flush()

    def expect(self, stats: StepStats) -> None:
        """Take in what a planned step was expected to bring, and what it did."""
        self._counts["paceline:planned_expected"] += sum(stats.gains.values())
        self._counts["paceline:planned_accepted"] += stats.num_committed - stats.num_sampling

    def failed(self) -> None:
        """Count an exception."""
        self._counts["paceline:errors"] += 1
        self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        lengths = self._made["paceline:chosen_length"]
        for length, count in enumerate(self._lengths):
            if count:
                lengths.labels(length=str(length)).inc(count)
                self._lengths[length] = 0
        for name, value in self._counts.items():
            if value:
                self._made[name].inc(value)
                self._counts[name] = 0.0
        if self._price is not None:
            self._made[PRICE].set(self._price)


@cache
def _instruments() -> dict[str, Any]:
    """Made once for a process: the registry takes every name only once."""
    from prometheus_client import Counter as Counts
    from prometheus_client import Gauge

    made: dict[str, Any] = {
        name: Counts(name, text, ["length"] if name == "paceline:chosen_length" else []) for name, text in NAMES.items()
    }
    made[PRICE] = Gauge(PRICE, _PRICE_HELP, multiprocess_mode="mostrecent")
    return made
