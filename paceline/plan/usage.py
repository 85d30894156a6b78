"""Which drafters are asked: those that bring more than their time is worth, and the others now and then.

What a drafter brings is the survival of its verified nodes less what verifying them cost; what its own time costs is
measured. So is what a step in which any are asked takes around them: planning, merging, cutting, learning. One that
does not pay is asked in shadow, once in so many steps that its time, and what is around it, stays a small share of the
whole; its nodes are labelled, so that the estimates never go blind, and a shadow step in which it pays brings it back
at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from paceline.arrays import IntArray
from paceline.engine.types import StepStats

_FADE = 0.98
"""Text repeats itself now and then, so what asking brings is judged over some 50 steps."""
_SECOND_TRIAL = 1.5
"""A look that pays makes a drafter worth at least so many times its cost: it is asked for some 20 steps again."""
_TRIALS = 8
"""Steps in which a drafter is asked before it is judged."""
_SHADOW_SHARE = 0.001
"""Of all time, for one drafter that does not pay."""
_LOOK_SHARE = 0.01
"""Likewise for what is around looks, of all drafters together."""
_AROUND_FADE = 0.95
_FIRST_FEW = 2
"""Requests that a drafter is asked for when its time is not known, ..."""
_FEW_SHARE = 0.5
"""... and share of a step that finding out about it may take."""
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
        self.turn = 0
        """Requests that it was asked for where that was some of them."""

    def pays(self, goodput: float) -> bool:
        """Whether it brings more tokens than its time would; true until it was tried."""
        return self.asked < _TRIALS or self.gain > goodput * self.seconds

    def next_look(self, seconds: float, around: float, step_seconds: float) -> int:
        """The step from which on a look in shadow is due that takes `seconds`, and all looks of a step `around`."""
        share = seconds / step_seconds
        longest = _LONG_PERIOD * max(1.0, share / _LARGE_LOOK)
        wanted = max(share / _SHADOW_SHARE, around / step_seconds / _LOOK_SHARE, 1.0)
        return self.last + math.ceil(min(wanted, longest))

    def learn(self, gain: float, seconds: float, goodput: float, around: float = 0.0) -> None:
        """Take in a step in which it was asked; values per sampling request."""
        rate = max(1.0 / (self.asked + 1), 1.0 - _FADE)
        cost = goodput * (seconds + around)
        returning = gain > cost > self.gain and self.asked >= _TRIALS
        self.gain += rate * (gain - self.gain)
        self.seconds += rate * (min(seconds, 4.0 * self.seconds if self.asked else seconds) - self.seconds)
        self.asked += 1
        if returning:
            self.gain = max(self.gain, _SECOND_TRIAL * cost)


class Usage:
    """The drafters of a policy."""

    def __init__(self) -> None:
        self._use: dict[str, DrafterUse] = {}
        self._outside: dict[bool, float] = {}
        """Seconds of a step without draft nodes outside forward and drafters, by whether any drafter was asked."""

    @property
    def around(self) -> float:
        """Seconds that a step in which drafters find nothing takes around them, beyond one in which none is asked; 0
        until both were seen. (What more a step with draft nodes takes is part of what its size costs.)"""
        return max(self._outside[True] - self._outside[False], 0.0) if len(self._outside) > 1 else 0.0

    def paying(self, names: Iterable[str], requests: int, goodput: float, *, alone: bool) -> list[str]:
        """The drafters that bring more than their time.

        Args:
            names: those that could be asked.
            requests: that sample in the step.
            goodput: tokens per second that time is worth.
            alone: whether no others are asked anyway, so that they must pay for what is around them as well.
        """
        uses = {name: self._use.setdefault(name, DrafterUse()) for name in names}
        paying = [name for name, use in uses.items() if use.pays(goodput)]
        if not alone or any(uses[name].asked < _TRIALS for name in paying):
            return paying
        net = sum(uses[name].gain - goodput * uses[name].seconds for name in paying)
        return paying if net * requests > goodput * self.around else []

    def asked(self, name: str, step: int) -> None:
        """Note that a drafter is asked in this step."""
        self._use[name].last = step

    def next_look(self, name: str, requests: int, step_seconds: float) -> int:
        """The step from which on a drafter that is not worth asking is due to be looked at; arguments as above."""
        use = self._use.setdefault(name, DrafterUse())
        return use.next_look(use.seconds * requests, self.around, step_seconds)

    def is_proven(self, name: str) -> bool:
        """Whether a drafter was asked often enough to be judged."""
        return name in self._use and self._use[name].asked >= _TRIALS

    def few(self, name: str, requests: int, step_seconds: float) -> IntArray | None:
        """For which requests a drafter may be asked to find out about it, others every time; None: for all."""
        use = self._use.setdefault(name, DrafterUse())
        count = max(int(_FEW_SHARE * step_seconds / max(use.seconds, 1e-9)), 1) if use.asked else _FIRST_FEW
        if count >= requests:
            return None
        first, use.turn = use.turn, use.turn + count
        return (first + np.arange(count)) % requests

    def probe(self, name: str, step: int, seconds: float, step_seconds: float) -> bool:
        """Whether a drafter that is planned by depth should look one token further than it pays, for `seconds`."""
        use = self._use.setdefault(name, DrafterUse())
        if step >= use.next_look(seconds, 0.0, step_seconds):
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
        if stats.num_sampling:
            if not stats.num_prompt_tokens and not stats.num_draft_nodes:
                self._learn_outside(stats)
            for name, seconds in stats.draft_seconds.items():
                use = self._use.setdefault(name, DrafterUse())
                requests = stats.asked.get(name, stats.num_sampling)
                if not requests:
                    continue
                net = stats.gains.get(name, 0.0) - node_cost * stats.nodes.get(name, 0)
                use.learn(max(net, 0.0) / requests, seconds / requests, goodput, self.around / stats.num_sampling)

    def _learn_outside(self, stats: StepStats) -> None:
        asked = bool(stats.draft_seconds)
        seconds = max(stats.step_seconds - stats.forward_seconds - sum(stats.draft_seconds.values()), 0.0)
        before = self._outside.get(asked, seconds)
        self._outside[asked] = _AROUND_FADE * before + (1.0 - _AROUND_FADE) * min(seconds, 4.0 * before)

    def rates(self) -> Mapping[str, tuple[float, float]]:
        """Expected tokens and seconds per request and step, by drafter."""
        return {name: (use.gain, use.seconds) for name, use in self._use.items()}
