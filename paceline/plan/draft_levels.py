"""How deep `auto` lets a draft model draft: before the step whether at all, and after every draft forward who goes on.

After a draft forward the confidence classes of the newest nodes are known, and with them how likely each request's
chain is to be accepted so far. One more node of request i is expected to add

    survival_i * chance(next level)  -  goodput * (its slot + its share of the forward)

tokens. Requests for which that is negative leave; the others go on together if their sum exceeds what the forward
itself takes. Everything this looks at was known before the newest tokens were drawn, or is kept, so it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paceline.arrays import BoolArray, FloatArray
from paceline.engine.draft_progress import DraftProgress
from paceline.plan.base import DrafterLimits, Sampling
from paceline.plan.cost_model import CostModel
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.usage import Usage

_NET_MEMORY = 0.7
"""Of what each depth is worth: the best of noisy values is mostly noise, and depths that change cost most."""


class DraftLevels:
    """Plans the levels of draft models.

    Args:
        estimates: acceptance by depth.
        cost: what draft forwards take.
        usage: says when to look one level further than it pays.
        dynamic: whether to ask after every forward (there is one draft model); otherwise the planned depth is all.
    """

    def __init__(self, estimates: AcceptanceEstimates, cost: CostModel, usage: Usage, *, dynamic: bool) -> None:
        self._estimates = estimates
        self._cost = cost
        self._usage = usage
        self._dynamic = dynamic
        self._net: dict[str, FloatArray] = {}  # by drafter, what each depth is worth  # [levels]

    def plan(
        self, drafter: DrafterLimits, asked: Sampling, step: int, times: FloatArray, goodput: float
    ) -> tuple[int, PricedStop | None]:
        """Most levels of a drafter in this step (0: it is not asked), and the stop.

        Args:
            drafter: a draft model.
            asked: the step's requests.
            step: its number.
            times: expected seconds of the step over 0 .. most draft nodes.
            goodput: tokens that a second is worth.
        """
        count, levels = len(asked), max(int(drafter.most / drafter.width), 1)
        likely = self._estimates.by_depth(drafter.name, asked.requests, asked.rows, levels)  # [count, levels]
        costs = np.array([self._cost.draft_seconds(drafter.name, d, count) for d in range(levels + 1)])
        depth = self._depth(drafter, likely * (np.arange(levels) < asked.room[:, None]), costs, times, goodput)
        probes = depth < levels and self._usage.probe(
            drafter.name, step, costs[depth + 1] - costs[depth], float(times[0])
        )
        if not self._dynamic or not depth + probes:
            return depth + probes, None
        forward = self._cost.draft_seconds(drafter.name, 1, 0) - self._cost.draft_seconds(drafter.name, 0, 0)
        return levels, PricedStop(
            times=times,
            goodput=goodput,
            chances=_conditional(likely),
            per_forward=forward,
            per_node=(float(costs[1] - costs[0]) - forward) / count,
            width=drafter.width,
            least=depth + 1 if probes else 1,
        )

    def _depth(
        self, drafter: DrafterLimits, survival: FloatArray, costs: FloatArray, times: FloatArray, goodput: float
    ) -> int:
        """The depth at which a next forward for the whole batch stops paying, as far as it is known beforehand.

        A depth is worth the tokens that the best nodes down to it are expected to bring, after they have paid for
        their slots and for the forwards that draft them.
        """
        levels = survival.shape[1]
        order = np.argsort(-survival, axis=None, kind="stable")[: len(times) - 1]
        ranked, depths = survival.ravel()[order], order % levels
        taken = depths[None] <= np.arange(levels)[:, None]  # [levels, count * levels]
        slots = np.minimum((drafter.width * np.cumsum(taken, axis=1)).astype(np.int64), len(times) - 1)
        gain = np.cumsum(ranked * taken, axis=1) - goodput * (times[slots] - times[0])
        net = np.maximum(gain.max(axis=1), 0.0) - goodput * costs[1:]
        net = self._net[drafter.name] = _NET_MEMORY * self._net.get(drafter.name, net) + (1.0 - _NET_MEMORY) * net
        return int(net.argmax()) + 1 if net.max() > 0.0 else 0


def _conditional(likely: FloatArray) -> FloatArray:
    """Of being accepted down to a level, given that down to the level before.  # [num_sampling, levels]"""
    before = np.concatenate([np.ones((len(likely), 1)), likely[:, :-1]], axis=1)
    return np.asarray(np.divide(likely, before, out=np.zeros_like(likely), where=before > 0.0))


@dataclass(slots=True)
class PricedStop:
    """The stop of one step."""

    times: FloatArray  # [most + 1]
    """Expected seconds of the step over 0 .. `most` draft nodes."""
    goodput: float
    """Tokens that a second is worth."""
    chances: FloatArray  # [num_sampling, levels]
    """That a node of the next level is accepted if one of this level was (0: the first level)."""
    per_forward: float
    """Seconds of a draft forward, whoever takes part."""
    per_node: float
    """Seconds that each request adds to it."""
    width: float
    """Nodes that a request adds in a level."""
    least: int
    """Levels that are drafted whatever they are worth, to see what they are worth."""
    wants_hidden: bool = False
    wants_top_probabilities: bool = False
    _nodes: dict[int, int] = field(default_factory=dict)

    def keep(self, progress: DraftProgress) -> BoolArray:
        """Who goes on.  # [n]"""
        rows, depth = progress.rows, progress.depth
        if depth < self.least:
            return np.ones(len(rows), dtype=np.bool_)
        if depth >= self.chances.shape[1]:
            return np.zeros(len(rows), dtype=np.bool_)
        self._nodes.update(zip(rows.tolist(), progress.nodes.tolist(), strict=True))
        gain = progress.survival * self.chances[rows, depth]
        net = gain - self.goodput * (self.per_node + self.width * self._slot(len(rows)))
        pays = net > 0.0
        if net[pays].sum() <= self.goodput * self.per_forward:
            pays[:] = False
        return np.asarray(pays)

    def _slot(self, requests: int) -> float:
        """Seconds that each of the next nodes adds to the target's forward."""
        last = len(self.times) - 1
        now = min(sum(self._nodes.values()), last)
        more = max(round(requests * self.width), 1)
        then = min(now + more, last)
        return max(float(self.times[then] - self.times[now]), 0.0) / (then - now) if then > now else np.inf
