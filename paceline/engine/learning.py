"""When a step's statistics are worked out, and when the plan learns from them.

They are worked out where somebody asks for them. A device that runs ahead must not wait for that: what a step with
draft nodes taught is learned when the next one was launched, which also ends its time, since the device was idle until
then because of its nodes. And of plain steps that follow one another, most say nothing new.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from paceline.engine.feedback import slot_price, step_stats
from paceline.engine.types import AcceptedStep, InFlight, StepStats, TargetScores
from paceline.model.runner import ModelRunner
from paceline.plan.base import LengthPolicy

logger = logging.getLogger(__name__)
_SETTLED = 16
"""Plain steps of the same requests in a row after which only every `_SELDOM`th is learned from."""
_SELDOM = 8
_READ = TargetScores(torch.empty(0), ())
"""In place of a committed step's scores, which nobody reads any more."""


class _Lazily:
    """A step's statistics, worked out when they are first asked for, by whichever thread."""

    def __init__(self, work_out: Callable[[], StepStats]) -> None:
        self._work_out: Callable[[], StepStats] | None = work_out
        self._stats: StepStats | None = None

    def get(self) -> StepStats | None:
        """They; None if they could not be worked out."""
        work_out = self._work_out
        if work_out is not None:
            try:
                self._stats = work_out()
            except Exception:
                logger.exception("a step's statistics could not be worked out; its tokens are committed")
            self._work_out = None  # the step itself is not kept
        return self._stats


class Learning:
    """The backward edge to the plan.

    Args:
        policy: what learns, if anything does.
        runner: whether it runs ahead, and compiles or captures meanwhile.
    """

    def __init__(self, policy: LengthPolicy | None, runner: ModelRunner) -> None:
        self.slot_price = 0.0
        """Of the latest step in which a policy priced the draft nodes."""
        self._policy = policy
        self._runner = runner
        self._prepared = runner.num_preparations
        self._latest: _Lazily | None = None
        self._owed: float | None = None
        """When the latest step ended, if its time is known only when the next one is launched."""
        self._plain = 0, 0
        """Plain steps since the requests changed or a tree was walked, and how many requests there are."""

    @property
    def last_stats(self) -> StepStats | None:
        """Of the latest step."""
        latest = self._latest
        return None if latest is None else latest.get()

    def take(self, step: AcceptedStep, observe_seconds: Mapping[str, float]) -> None:
        """Take in a committed step.

        Args:
            step: it.
            observe_seconds: what the drafters spent on learning from it.
        """
        if (price := slot_price(step)) is not None:
            self.slot_price = price
        ahead = self._runner.most_carried > 0
        # What follows the samples is done while the next step runs, where one can run already.
        ended = self._runner.last_read if ahead and step.scores.all_drawn else time.perf_counter()
        step.scores = _READ
        self._owed, self._latest = None, _Lazily(partial(step_stats, step, ended - step.started, observe_seconds))
        prepared, self._prepared = self._prepared, self._runner.num_preparations
        if prepared != self._prepared or (ahead and self._says_nothing_new(step)):
            return
        if ahead and step.walks and not any(item.request.finished for item in step.batch.items):
            self._owed = ended
        else:
            self._learn()

    def settle(self, step: InFlight, started: float, left: float) -> None:
        """Learn from the step before one that was just launched, if that was put off.

        Args:
            step: what was launched; its time will begin where that of the one before ends.
            started: when making it began.
            left: when the engine was left before.
        """
        ended, self._owed = self._owed, None
        if ended is None:
            return
        # The device was idle meanwhile because of the nodes of the step before: that was part of their price.
        drafting, now = sum(step.drafted.seconds.values()), time.perf_counter()
        idle = max(max(left - ended, 0.0) + now - started - drafting, 0.0)
        stats = self.last_stats
        prepared = self._runner.num_preparations != self._prepared
        if stats is None or prepared or any(request.finished for request in stats.requests):
            return
        longer = replace(stats, step_seconds=stats.step_seconds + idle)
        self._latest = _Lazily(lambda: longer)
        self._learn()
        step.started = now - drafting

    def _says_nothing_new(self, step: AcceptedStep) -> bool:
        """Whether it is one of many plain steps; drafters that found nothing between them change nothing."""
        count, requests = self._plain
        size = len(step.batch.items)
        if step.walks or requests != size or len(step.batch.sampling) < size:
            self._plain = 0, size
            return False
        if step.drafted.seconds:
            return False
        self._plain = count + 1, size
        return count > _SETTLED and count % _SELDOM > 0

    def _learn(self) -> None:
        stats = None if self._policy is None else self.last_stats
        if self._policy is None or stats is None:
            return
        try:
            self._policy.learn(stats)
        except Exception:
            logger.exception("a step could not be learned from; its tokens are committed")
