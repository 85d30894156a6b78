"""Length policies replayed on recorded outputs: what SmartSpec, BASS and `auto` do at every load, on an event clock.

The policies run as in the engine; the outputs are recorded, the time of a step comes from a measured cost table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from paceline.arrays import IntArray
from paceline.bench.replay import NONE, Outcome, Replay, Setting
from paceline.bench.replay_traces import RECORDED, Recorded, Script, read_trace
from paceline.bench.systems.context import Context
from paceline.plan.cost_model import CostTable, DraftCost

LOADS = (1, 8, 32, 128, 512)
MOST = 8
FIXED = tuple(f"fixed:k={k}" for k in range(1, MOST + 1))
_DRAFT_SHARE = 0.1
"""What a depth of a draft that is made up costs, as a share of a target forward of one token."""


@dataclass(frozen=True, slots=True)
class Load:
    """All policies on one trace, drafter, machine and batch size."""

    name: str
    outcomes: dict[str, Outcome]

    def best_fixed(self, *, with_none: bool = True) -> tuple[str, float]:
        """The best length in hindsight, and its goodput."""
        lengths = [*FIXED, NONE] if with_none else list(FIXED)
        best = max(lengths, key=lambda policy: self.outcomes[policy].goodput)
        return best, self.outcomes[best].goodput

    def over_best_fixed(self, policy: str) -> float:
        """Goodput of a policy over that of the best length."""
        return self.outcomes[policy].goodput / self.best_fixed()[1]

    @property
    def zero_wins_by(self) -> float:
        """Goodput without look-ahead over that of the best length of at least 1."""
        return self.outcomes[NONE].goodput / self.best_fixed(with_none=False)[1]


def loads(context: Context, policies: Sequence[str]) -> list[Load]:
    """These policies and every fixed length at every load; what was replayed before is not replayed again."""
    found: list[Load] = []
    for trace, drafter, path, table in _pairs(context):
        script = context.once(("script", path, drafter), partial(Script, trace, drafter))
        replay = Replay(trace, {drafter: script}, table)
        for batch in LOADS[: context.few(len(LOADS), 3)]:
            outcomes = {}
            for policy in (NONE, *FIXED, *policies):
                name = f"{path.stem}/{drafter}/{batch}"
                context.say(f"Replaying {name}: {policy}")
                tokens = max(context.few(6000, 2000), context.few(60, 30) * batch)
                setting = Setting(policy, drafter, batch, tokens=tokens, most=MOST)
                key = ("replay", str(path), table.tokens, setting)
                outcomes[policy] = context.once(key, partial(replay.run, setting))
            found.append(Load(name, outcomes))
    return found


def _pairs(context: Context) -> Iterator[tuple[list[Recorded], str, Path, CostTable]]:
    """Every trace with every drafter on the machine that it was recorded for, or on the first that has its drafter."""
    outputs, tables = context.traces
    costs = [CostTable.load(path, "--traces") for path in tables]
    for path in outputs:
        trace = read_trace(path, limit=context.few(40, 20))
        for drafter in [*(RECORDED + name for name in trace[0].right), "ngram"]:
            name = drafter.removeprefix(RECORDED)
            table = next((t for t in costs if name in t.draft), costs[-1])
            yield trace, drafter, path, table


def made_load(context: Context, rate: float, batch: int, policies: Sequence[str]) -> Load:
    """Policies on a trace whose draft tokens are right with this probability, each independently of the others."""
    outputs, tables = context.traces
    table = CostTable.load(tables[-1], "--traces")
    table = replace(table, draft={"made": DraftCost(per_depth=_DRAFT_SHARE * (table.seconds[0] + table.per_step))})
    random = np.random.default_rng(round(1000 * rate))
    recorded = read_trace(outputs[0], limit=40)
    trace = [replace(item, right={"made": _right(random, rate, len(item.output))}) for item in recorded]
    drafter = RECORDED + "made"
    replay = Replay(trace, {drafter: Script(trace, drafter)}, table)
    load = Load(f"drafts right at {rate}/{batch}", {})
    for policy in policies:
        context.say(f"Replaying {load.name}: {policy}")
        tokens = max(context.few(3000, 1000), 60 * batch)
        load.outcomes[policy] = replay.run(Setting(policy, drafter, batch, tokens=tokens, most=MOST))
    return load


def _right(random: np.random.Generator, rate: float, count: int) -> IntArray:
    lengths = random.geometric(1.0 - rate, count) - 1
    return np.minimum(lengths, np.arange(count, 0, -1)).astype(np.int64)
