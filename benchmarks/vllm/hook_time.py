"""Processor time of Paceline's hooks in a step, profiled without vLLM: the fakes of the unit tests stand for its types.

    python benchmarks/vllm/hook_time.py

Per row: requests, what drafts are like there, mean microseconds a step over 600 steps after the first 800 (trials and
plans included, the counting for `/metrics`, too), and draft tokens verified a step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests" / "unit"))

from vllm_world import Clock, FakeRequest, FakeScheduler, World

from paceline.integrations.vllm.clock import StepClock
from paceline.integrations.vllm.controller import Controller
from paceline.integrations.vllm.hooks import PacedScheduler
from paceline.integrations.vllm.metrics import Meter
from paceline.integrations.vllm.options import Options
from paceline.integrations.vllm.step import Method

HOOKS = ("_before", "_scheduled", "_read", "_learn")
HABITS = {"good drafts, free slots": (0.8, 1e-6), "fair drafts, dear slots": (0.5, 1e-4), "bad drafts": (0.1, 1e-4)}


class Paced(PacedScheduler, FakeScheduler):
    """As the factory makes it."""


def main() -> None:
    """Run and print."""
    for requests in (1, 8, 64):
        for name, (right, per_token) in HABITS.items():
            scheduler: Any = Paced(4)
            clock = Clock()
            scheduler.pace_with(Controller(Method("ngram", 4), Options(), 100_000), Meter(4))
            scheduler._clock = StepClock(clock)
            for i in range(requests):
                scheduler.add(FakeRequest(str(i)))
            world = World(scheduler, clock, right=right, step_seconds=lambda n, cost=per_token: 0.01 + cost * n)
            world.steps(800)
            spent = watch(scheduler)
            world.steps(600)
            verified = sum(world.verified[-600:]) / 600
            print(f"{requests:>3} requests, {name:<24} {1e6 * spent[0] / 600:>6.0f} us/step, {verified:>6.1f} verified")


def watch(scheduler: Any) -> list[float]:
    """Sum the processor time in the hooks."""
    spent = [0.0]

    def timed(function: Any) -> Any:
        def run(*args: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args)
            finally:
                spent[0] += time.thread_time() - started

        return run

    for name in HOOKS:
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    return spent


if __name__ == "__main__":
    main()
