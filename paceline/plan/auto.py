"""`auto`: look ahead as far as it pays, from measured step times and moving acceptance rates.

A draft node is worth verifying while its survival exceeds goodput times the time it adds (`trim` applies that price).
Drafters that read tokens propose freely and are cut afterwards, so their estimates are never blind: even a step that
verifies nothing labels its root's children. A draft model pays per token, so its depth is chosen beforehand from its
moving acceptance rate, and probed once in a while when it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.engine.types import ScheduledBatch, SpecPlan, StepPrice, StepStats
from paceline.plan.base import PLAIN, DrafterLimits, room
from paceline.plan.step_time import StepTime
from paceline.plan.survival import AcceptanceEstimates

_MAX_BUCKET = 256
_MEMORY = 0.95
"""Weight of the goodput so far after each step."""
_PROBE_EVERY = 64


class AutoLength:
    """The price of a verification slot, in its simplest form.

    Args:
        drafters: with `most` as their caps.
        estimates: acceptance by confidence class.
        step_time: the measured time of a step.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, step_time: StepTime) -> None:
        self._drafters = {d.name: d for d in drafters}
        self._estimates = estimates
        self._step_time = step_time
        self._goodput: dict[int, tuple[float, float]] = {}  # requests -> (tokens, seconds), both fading
        self._draft_seconds: dict[str, float] = {}  # per depth: one draft forward of the batch
        self._steps = 0

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """Budgets and the price of this step."""
        self._steps += 1
        requests = len(batch.sampling)
        most = sum(d.most for d in self._drafters.values())
        budgets = room(batch, max_model_len, most)
        if not any(budgets):
            return PLAIN
        bucket = min(sum(budgets), _MAX_BUCKET)
        sizes = batch.num_tokens + np.arange(bucket + 1, dtype=np.float64)
        price = StepPrice(self._step_time.at(sizes, requests), self._lambda(requests))
        limits = {
            name: self._depth(d, batch, price) if d.cost_per_token else d.most for name, d in self._drafters.items()
        }
        used = tuple(name for name in self._drafters if limits[name] > 0)
        return SpecPlan(budgets, used, bucket, self._estimates.of_batch(batch), limits, price)

    def learn(self, stats: StepStats) -> None:
        """Update acceptance, step time, goodput and the cost of drafting."""
        self._estimates.learn(stats.labels)
        for name, depth in stats.draft_depths.items():
            if self._drafters[name].cost_per_token and depth:
                cost = stats.draft_seconds[name] / depth
                self._draft_seconds[name] = 0.9 * self._draft_seconds.get(name, cost) + 0.1 * cost
        if not stats.num_sampling or stats.num_tokens != stats.num_sampling:
            return  # a prefill chunk ran along: this step says little about decoding
        paid = sum(s for name, s in stats.draft_seconds.items() if self._drafters[name].cost_per_token)
        size = stats.num_tokens + stats.num_draft_nodes
        self._step_time.learn(size, stats.num_sampling, stats.step_seconds - paid)
        tokens, seconds = self._goodput.get(stats.num_sampling, (0.0, 0.0))
        self._goodput[stats.num_sampling] = (
            _MEMORY * tokens + stats.num_committed,
            _MEMORY * seconds + stats.step_seconds,
        )

    def _lambda(self, requests: int) -> float:
        """Long-run tokens per second with this many requests; before any measurement, that of plain decoding."""
        tokens, seconds = self._goodput.get(requests, (0.0, 0.0))
        plain = requests / float(self._step_time.at(np.array([float(requests)]), requests)[0])
        return max(tokens / seconds, plain) if seconds else plain

    def _depth(self, drafter: DrafterLimits, batch: ScheduledBatch, price: StepPrice) -> int:
        """Draft depth that maximises expected tokens minus the price of drafting and verifying them."""
        cost = self._draft_seconds.get(drafter.name)
        if cost is None:
            return min(2, drafter.most)
        requests = len(batch.sampling)
        rate = float(np.mean([self._estimates.rate(drafter.name, item.request.salt) for item in batch.sampling]))
        depth = np.arange(1, drafter.most + 1)
        nodes = np.minimum(depth * requests, len(price.times) - 1)
        gain = requests * np.cumsum(rate**depth)
        value = gain - price.goodput * (price.times[nodes] - price.times[0] + depth * cost)
        best = int(value.argmax())
        if value[best] > 0.0:
            return best + 1
        return 1 if self._steps % _PROBE_EVERY == 0 else 0
