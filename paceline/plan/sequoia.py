"""Sequoia's choice of tree size and depth for the machine (2402.12374, section 4.3).

Over all sizes m and depths d it minimises the expected time of a token,

    (t_draft(d) + t_target(m)) / (1 + gain(m, d)),

where gain(m, d) is what the best tree of m nodes and d levels brings, by the dynamic programme over the positional
acceptance vector (`engine.positional`), measured online, and the times are those of the cost model for the whole batch,
every request looking ahead by the same tree. m = 0 is one of the sizes.

The tree itself grows in the drafter: shape `sequoia` (`--tree sequoia`) makes the tree this was computed for. A drafter
of another kind counts as one whose every node has one child, accepted as often as its labelled nodes were lately.
Several drafters are each sized as if the others were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from paceline.arrays import FloatArray
from paceline.engine.positional import positional, tree_table
from paceline.engine.request import Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, Sampling, sampling
from paceline.plan.cost_model import CostModel
from paceline.plan.lengths import plan_lengths
from paceline.plan.survival import AcceptanceEstimates

_EVERY = 16
"""Steps between two decisions."""
_PROBE_EVERY = 4
"""At size 0 nothing is measured: every so many decisions one step looks ahead all the same."""
_MEMORY = 0.9
_FIRST_RATE = 0.5


@dataclass(frozen=True, slots=True)
class TreeSize:
    """Nodes and levels of a tree, for every request of a batch."""

    nodes: int
    depth: int


def best_size(gain: FloatArray, target: FloatArray, draft: FloatArray, *, least: int = 0) -> TreeSize:
    """The size of the least expected time per token.

    Args:
        gain: expected accepted nodes by depth and size.  # [depths + 1, sizes]
        target: seconds of a step that verifies a tree of each size.  # [sizes]
        draft: seconds to draft each depth.  # [depths + 1]
        least: the smallest size allowed.
    """
    seconds = draft[:, None] + target[None]
    seconds[0, 1:] = np.inf  # no levels, no nodes
    seconds[1:, 0] = np.inf
    seconds[:, :least] = np.inf
    depth, nodes = np.unravel_index(int((seconds / (1.0 + gain)).argmin()), seconds.shape)
    return TreeSize(int(nodes), int(depth))


class SequoiaLength:
    """The policy.

    Args:
        drafters: with `most` as the largest tree.
        estimates: acceptance by class.
        cost: what steps take.
    """

    def __init__(self, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, cost: CostModel) -> None:
        self._drafters = tuple(drafters)
        self._most = sum(d.most for d in drafters)
        self._estimates = estimates
        self._cost = cost
        self._sizes: dict[str, TreeSize] = {}
        self._rates = {d.name: _FIRST_RATE for d in drafters if not d.by_rank}
        self._steps = 0

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """Trees of the current size for everybody."""
        asked = sampling(batch, self._estimates.requests, max_model_len, self._most)
        sizes = self._sizes
        if len(asked):
            decision, since = divmod(self._steps, _EVERY)
            if not since:
                sizes = self._sizes = self._decide(batch, asked, least=0)
                if not decision % _PROBE_EVERY and not all(size.nodes for size in sizes.values()):
                    sizes = self._decide(batch, asked, least=1)
            self._steps += 1
        drafters = [replace(d, most=sizes[d.name].nodes) if d.name in sizes else d for d in self._drafters]
        plan = plan_lengths(asked, np.full(len(asked), self._most), drafters, self._estimates)
        depths = {d.name: sizes[d.name].depth for d in drafters if d.cost_per_token and d.name in sizes}
        return replace(plan, depths=depths) if plan.looks_ahead else plan

    def learn(self, stats: StepStats) -> None:
        """Update acceptance and costs."""
        self._estimates.learn(stats)
        self._cost.learn(stats)
        for number, name in enumerate(stats.labels.names):
            accepted = stats.labels.accepted[stats.labels.drafter == number]
            if name in self._rates and len(accepted):
                self._rates[name] = _MEMORY * self._rates[name] + (1.0 - _MEMORY) * float(accepted.mean())

    def forget(self, request: Request) -> None:
        """Drop a finished request's estimates."""
        self._estimates.forget(request)

    def _decide(self, batch: ScheduledBatch, asked: Sampling, *, least: int) -> dict[str, TreeSize]:
        count = len(asked)
        context = sum(item.start + item.num_tokens for item in batch.items)
        free = [d for d in self._drafters if d.most and not d.fixed]
        most = max((d.most for d in free), default=0)
        times = self._cost.step_seconds(batch.num_tokens, most * count, len(batch.items), context)
        sizes: dict[str, TreeSize] = {}
        for d in free:
            table = tree_table(self._vector(d, asked), d.most, d.most)
            gain = table.gain[: d.most + 1, : d.most + 1]
            draft = np.zeros(len(gain))
            if d.cost_per_token:
                draft[1:] = [self._cost.draft_seconds(d.name, depth, count) for depth in range(1, len(gain))]
            sizes[d.name] = best_size(gain, times[: d.most * count + 1 : count], draft, least=least)
        return sizes

    def _vector(self, drafter: DrafterLimits, asked: Sampling) -> FloatArray:
        """Acceptance by sibling rank, of the average request.  # [ranks]"""
        if not drafter.by_rank:
            return np.array([self._rates[drafter.name]])
        estimates = self._estimates.of_batch(asked.requests, asked.rows, (drafter.name,))[drafter.name]
        return positional(estimates.mean(axis=0))
