"""Counters of speculation, kept as plain numbers.

They grow with every request of every step. A Prometheus counter takes a lock for each increment; here only the engine
thread writes, and a scrape reads numbers that are at most a moment apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline.server.metric_names import ENGINE, LABELS

MAX_POSITIONS = 32
"""Draft depths with a counter of their own; deeper accepted tokens are only in the total."""


class DraftCounts(Collector):
    """How drafts fare.

    Args:
        model_name: value of the label `model_name`.
    """

    def __init__(self, model_name: str) -> None:
        self._labels = (model_name, ENGINE)
        self._drafts = 0
        self._drafted = 0
        self._accepted = 0
        self._by_length = [0] * (MAX_POSITIONS + 1)  # drafts by accepted tokens, the last entry: or more
        self._accepted_by: Counter[str] = Counter()
        self._drafted_by: Counter[str] = Counter()

    def add(self, num_drafted: int, drafters: Sequence[str | None]) -> None:
        """Count one request's draft.

        Args:
            num_drafted: draft nodes verified.
            drafters: who guessed each committed token; None is the target itself.
        """
        accepted = len(drafters) - drafters.count(None)
        self._drafts += 1
        self._drafted += num_drafted
        self._accepted += accepted
        self._by_length[min(accepted, MAX_POSITIONS)] += 1
        for name in drafters:
            if name is not None:
                self._accepted_by[name] += 1

    def add_drafted_by(self, totals: Mapping[str, int], counted: dict[str, int]) -> None:
        """Count what each drafter drafted for one request since the last call.

        Args:
            totals: draft nodes of the request so far, by drafter.
            counted: what was counted of them before; brought up to date.
        """
        for name, total in totals.items():
            self._drafted_by[name] += total - counted.get(name, 0)
            counted[name] = total

    def collect(self) -> Iterator[Metric]:
        """The counters under vLLM's names, and ours by drafter."""
        yield self._total(
            "vllm:spec_decode_num_drafts", "Steps in which draft tokens of a request were verified.", self._drafts
        )
        yield self._total("vllm:spec_decode_num_draft_tokens", "Draft tokens verified.", self._drafted)
        yield self._total(
            "vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted and committed.", self._accepted
        )
        yield self._labelled(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted at this depth of the draft; 0 follows the last committed token.",
            "position",
            self._per_position(),
        )
        yield self._labelled(
            "paceline:accepted_tokens", "Draft tokens accepted, by drafter.", "drafter", self._accepted_by.copy()
        )
        yield self._labelled(
            "paceline:drafted_tokens", "Draft tokens verified, by drafter.", "drafter", self._drafted_by.copy()
        )

    def _per_position(self) -> dict[str, int]:
        """Accepted tokens by depth, down to the deepest seen (depth 0 always, so that rates see the first one)."""
        at_least = 0
        counts: dict[str, int] = {}
        for length in range(MAX_POSITIONS, 0, -1):
            at_least += self._by_length[length]
            if at_least or length == 1:
                counts[str(length - 1)] = at_least
        return dict(reversed(counts.items()))

    def _total(self, name: str, text: str, value: int) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _labelled(self, name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=(*LABELS, label))
        for key, value in values.items():
            family.add_metric((*self._labels, key), value)
        return family
