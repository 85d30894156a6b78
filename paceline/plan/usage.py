"""Which drafters are asked: those that bring more than their time is worth, and the others now and then.

What a drafter brings is the survival of its verified nodes less what verifying them cost; what its own time costs is
measured. One that does not pay is asked in shadow, once in so many steps that its time stays a small share of the
whole; its nodes are labelled, so that the estimates never go blind, and a shadow step in which it pays brings it back
at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from paceline.engine.types import StepStats

_FADE = 0.9
_TRIALS = 8
"""Steps in which a drafter is asked before it is judged."""
_SHADOW_SHARE = 0.001
"""Of all time, for one drafter that does not pay."""
_LONG_PERIOD = 64
"""Looks come at least so often, ..."""
_LARGE_LOOK = 0.2
"""... unless one takes more than this share of a step; then so much more seldom."""


class DrafterUse:
    """One drafter's fading gain and cost, per sampling request of the steps in which it was asked."""

    def __init__(self) -> None:
        self.gain = 0.0
        self.seconds = 0.0
        self.asked = 0
        self.last = 0

    def pays(self, goodput: float) -> bool:
        """Whether it brings more tokens than its time would; true until it was tried."""
        return self.asked < _TRIALS or self.gain > goodput * self.seconds

    def next_look(self, seconds: float, step_seconds: float) -> int:
        """The step from which on a look in shadow that takes `seconds` is due."""
        share = seconds / step_seconds
        longest = _LONG_PERIOD * max(1.0, share / _LARGE_LOOK)
        return self.last + math.ceil(min(max(share / _SHADOW_SHARE, 1.0), longest))

    def due(self, step: int, seconds: float, step_seconds: float) -> bool:
        """Whether it is time for one."""
        return step >= self.next_look(seconds, step_seconds)

    def learn(self, gain: float, seconds: float, goodput: float) -> None:
        """Take in a step in which it was asked; values per sampling request."""
        first = self.asked == 0
        returning = not self.pays(goodput) and gain > goodput * seconds
        self.gain = gain if first or returning else _FADE * self.gain + (1.0 - _FADE) * gain
        self.seconds = seconds if first else _FADE * self.seconds + (1.0 - _FADE) * min(seconds, 4.0 * self.seconds)
        self.asked += 1


class Usage:
    """The drafters of a policy."""

    def __init__(self) -> None:
        self._use: dict[str, DrafterUse] = {}

    def wanted(self, name: str, step: int, requests: int, goodput: float, step_seconds: float, worthless: bool) -> bool:
        """Whether to ask a drafter in this step.

        Args:
            name: the drafter.
            step: number of the step.
            requests: requests that sample in it.
            goodput: tokens per second that time is worth.
            step_seconds: expected time of the step without look-ahead.
            worthless: not even a certain draft token would pay.
        """
        use = self._use.setdefault(name, DrafterUse())
        if (use.pays(goodput) and not worthless) or use.due(step, use.seconds * requests, step_seconds):
            use.last = step
            return True
        return False

    def next_look(self, name: str, requests: int, step_seconds: float) -> int:
        """The step from which on a drafter that is not worth asking is due to be looked at; arguments as above."""
        use = self._use.setdefault(name, DrafterUse())
        return use.next_look(use.seconds * requests, step_seconds)

    def probe(self, name: str, step: int, seconds: float, step_seconds: float) -> bool:
        """Whether a drafter that is planned by depth should look one token further than it pays, for `seconds`."""
        use = self._use.setdefault(name, DrafterUse())
        if use.due(step, seconds, step_seconds):
            use.last = step
            return True
        return False

    def learn(self, stats: StepStats, goodput: float, node_cost: float) -> None:
        """Take in gains and costs of those asked.

        Args:
            stats: of the step.
            goodput: tokens per second that time is worth.
            node_cost: what verifying a node of this step cost, in tokens.
        """
        requests = stats.num_sampling
        if requests:
            for name, seconds in stats.draft_seconds.items():
                use = self._use.setdefault(name, DrafterUse())
                net = stats.gains.get(name, 0.0) - node_cost * stats.nodes.get(name, 0)
                use.learn(max(net, 0.0) / requests, seconds / requests, goodput)

    def rates(self) -> Mapping[str, tuple[float, float]]:
        """Expected tokens and seconds per request and step, by drafter."""
        return {name: (use.gain, use.seconds) for name, use in self._use.items()}
