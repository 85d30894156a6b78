"""SmartSpec (2406.14066): one length for the batch that maximises estimated goodput; and `auto`, which generalises it.

Replayed on recorded outputs with a measured cost table. The bar is the best fixed length in hindsight, zero included,
at every load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paceline.bench.replay import NONE, Replay, Setting
from paceline.bench.replay_traces import RECORDED, Script
from paceline.bench.systems.base import Row, at_least, at_most, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.replays import MOST, Load, loads, made_up

POLICIES = ("smartspec", "auto")
_SLOWER = 1.02
"""No look-ahead must win by this much before zero is asked for: below it the policy cannot tell."""


def _goodput(context: Context) -> Iterator[Row]:
    """Goodput over the best fixed length at every load."""
    found = loads(context, POLICIES)
    for policy in POLICIES:
        ratios = {load.name: load.over_best_fixed(policy) for load in found}
        worst = min(ratios, key=lambda name: ratios[name])
        best = next(load for load in found if load.name == worst).best_fixed()[0]
        note = f"worst of {len(found)} loads: {worst} (best: {best}); median {np.median(list(ratios.values())):.3f}"
        yield at_least(f"{policy}: goodput over the best fixed length", ratios[worst], 0.95, note)


def _zero(context: Context) -> Iterator[Row]:
    """Zero look-ahead where every length is slower."""
    found = [load for load in loads(context, POLICIES) if load.zero_wins_by > _SLOWER]
    for policy in POLICIES:
        drafted = [_drafted_per_token(load, policy) for load in found]
        note = f"loads where none beats every length by 2%: {', '.join(load.name for load in found) or 'none'}"
        if policy == "auto":
            note += "; auto goes on trying with few tokens, to notice when drafts become good"
        if found:
            yield at_most(f"{policy}: draft tokens per token where zero is best", max(drafted), 0.1, note)
        else:
            yield Row(f"{policy}: zero where every length is slower", None, "a load where zero is best", False, note)


def _drafted_per_token(load: Load, policy: str) -> float:
    outcome = load.outcomes[policy]
    return outcome.draft_tokens / outcome.tokens


def _controls(context: Context) -> Iterator[Row]:
    """Drafts that are nearly always wrong, and nearly always right."""
    for policy in POLICIES:
        bad = _lengths(context, 0.1, policy)
        note = (
            f"mean length {np.mean(bad):.3f} over {len(bad)} steps at batch 1; a draft step costs a tenth of a forward"
        )
        yield exactly(f"{policy}: acceptance 0.1 forces length 0", float(np.median(_late(bad))), 0, note)
        good = _lengths(context, 0.95, policy)
        note = f"mean length {np.mean(good):.3f}; the last step of a request has no room for more"
        yield exactly(f"{policy}: acceptance 0.95 forces length {MOST}", float(np.median(_late(good))), MOST, note)


def _late(lengths: Sequence[float]) -> Sequence[float]:
    """The second half: a policy has learnt by then."""
    return lengths[len(lengths) // 2 :]


def _lengths(context: Context, rate: float, policy: str) -> list[float]:
    context.say(f"{policy} at acceptance {rate}")
    trace, table = made_up(context, rate)
    name = RECORDED + "made"
    outcome = Replay(trace, {name: Script(trace, name)}, table).run(
        Setting(policy, name, 1, tokens=context.few(3000, 1000), most=MOST)
    )
    return outcome.lengths


def _never_slower(context: Context) -> Iterator[Row]:
    """Goodput over no look-ahead at every load."""
    found = loads(context, POLICIES)
    for policy in POLICIES:
        ratios = {load.name: load.outcomes[policy].goodput / load.outcomes[NONE].goodput for load in found}
        worst = min(ratios, key=lambda name: ratios[name])
        note = f"worst of {len(found)} loads: {worst}; best {max(ratios.values()):.2f}"
        yield at_least(f"{policy}: goodput over none", ratios[worst], 0.99, note)


run = suite(_goodput, _zero, _controls, _never_slower)
