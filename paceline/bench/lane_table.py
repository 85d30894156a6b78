"""Every schedule on the event clock, by speed ratio and acceptance: where a lane for the draft pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from paceline.lanes import choice
from paceline.lanes.choice import LaneTimes
from paceline.lanes.clock import Clock
from paceline.lanes.pearl import Pearl
from paceline.lanes.pipeinfer import PipeInfer
from paceline.lanes.plain import plain, speculation
from paceline.lanes.tokens import Text
from paceline.lanes.traces import Trace, made
from paceline.lanes.work import Process

LENGTHS = range(2, 17)
"""Of PEARL; with 1 nothing would ever be pending."""
SCHEDULES = ("none", "speculation", "PEARL, pre only", "PEARL, post only", "PEARL", "PipeInfer")
TEXTS = 3
Schedule = Callable[[Clock, Text], Process]


@dataclass(frozen=True, slots=True)
class Row:
    """One schedule at one point."""

    ratio: float
    """Draft tokens that take as long as a target forward."""
    acceptance: float
    schedule: str
    length: int
    """Draft tokens a round, the best by the formulas of `lanes.choice`; of PipeInfer tokens of a run, in hindsight."""
    over_none: float
    """Speed over no look-ahead."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is swept."""

    ratios: Sequence[float]
    acceptances: Sequence[float]
    growth: float = 0.0
    """What each further token adds to a target forward, as a share of one token's time."""
    stages: int = 4
    """Of PipeInfer's pipeline."""
    tokens: int = 120
    seed: int = 0

    def rows(self) -> Iterator[Row]:
        """All points, all schedules."""
        for ratio in self.ratios:
            times = LaneTimes({1: 1.0, 2: 1.0 + self.growth}, 1.0 / ratio)
            for acceptance in self.acceptances:
                traces = [made(acceptance, self.tokens, self.seed + i) for i in range(TEXTS)]
                base = _seconds(traces, times, plain)
                for name in SCHEDULES:
                    seconds, length = self._best(name, traces, times, acceptance)
                    yield Row(ratio, acceptance, name, length, base / seconds)

    def _best(self, name: str, traces: Sequence[Trace], times: LaneTimes, acceptance: float) -> tuple[float, int]:
        if name == "none":
            return _seconds(traces, times, plain), 0
        if name == "PipeInfer":
            return min((_pipeinfer(traces, times, self.stages, batch), batch) for batch in (1, 2, 4))
        formula, make = _SCHEDULES[name]
        lengths = (1, *LENGTHS) if name == "speculation" else LENGTHS
        length = min(lengths, key=lambda n: formula(times, n, acceptance))
        return _seconds(traces, times, make(length)), length


_SCHEDULES: dict[str, tuple[Callable[[LaneTimes, int, float], float], Callable[[int], Schedule]]] = {
    "speculation": (choice.speculation, lambda n: partial(speculation, length=n)),
    "PEARL, pre only": (lambda t, n, a: choice.pre_only(t, t, n, a), lambda n: Pearl(n, post=False).run),
    "PEARL, post only": (lambda t, n, a: choice.post_only(t, t, n, a), lambda n: Pearl(n, pre=False).run),
    "PEARL": (choice.pearl, lambda n: Pearl(n).run),
}


def _seconds(traces: Sequence[Trace], times: LaneTimes, schedule: Schedule) -> float:
    total = 0.0
    for trace in traces:
        clock, text = Clock({"draft": lambda n: n * times.draft, "target": times.forward}), trace.text()
        clock.spawn(schedule(clock, text))
        clock.run()
        total += text.times[-1]
    return total


def _pipeinfer(traces: Sequence[Trace], times: LaneTimes, stages: int, batch: int) -> float:
    total, names = 0.0, [f"stage {i}" for i in range(stages)]
    for trace in traces:
        lanes = {name: lambda n: times.forward(n) / stages for name in names}
        clock, text = Clock({"draft": lambda n: n * times.draft, **lanes}), trace.text()
        PipeInfer(clock, text, names, batch=batch).start()
        clock.run()
        total += text.times[-1]
    return total
