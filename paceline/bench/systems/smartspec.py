"""SmartSpec (2406.14066): one length for the batch that maximises estimated goodput; and `auto`, which generalises it.

Replayed on recorded outputs with a measured cost table. The bar is the best fixed length in hindsight, zero included,
at every load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paceline.bench.replay import NONE
from paceline.bench.systems.base import Row, at_least, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.replays import FIXED, MOST, Load, loads, made_load

POLICIES = ("smartspec", "auto")
_SLOWER = 1.02
"""No look-ahead must win by this much before zero is asked for: below it the policy cannot tell."""
_HOPELESS, _RIGHT = 0.05, 0.99
"""Acceptance of made-up drafts."""


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
    found += [load for load in _bad_drafts(context) if load.zero_wins_by > _SLOWER]
    for policy in POLICIES:
        late = [_late(load.outcomes[policy].lengths) for load in found]
        mean = max(float(np.mean(lengths)) for lengths in late)
        note = f"largest mean {mean:.3f}; none beats every length by 2% or more: {', '.join(x.name for x in found)}"
        chosen = max(float(np.median(lengths)) for lengths in late)
        yield exactly(f"{policy}: usual length where zero is best", chosen, 0, note)


def _bad_drafts(context: Context) -> list[Load]:
    """Loads under which no length pays: one draft token in twenty is right."""
    return [made_load(context, _HOPELESS, batch, (NONE, *FIXED, *POLICIES)) for batch in (1, 32)]


def _controls(context: Context) -> Iterator[Row]:
    """Drafts that are nearly always wrong, and nearly always right."""
    for policy, wrong in (("smartspec", 0.1), ("auto", _HOPELESS)):
        bad = made_load(context, wrong, 1, (policy,)).outcomes[policy].lengths
        note = f"mean {np.mean(bad):.3f} over {len(bad)} steps at batch 1; a draft step costs a tenth of a forward"
        if policy == "auto":
            note += ", so that 0.1 breaks even"
        yield exactly(f"{policy}: acceptance {wrong} forces length 0", float(np.median(_late(bad))), 0, note)
        outcome = made_load(context, _RIGHT, 1, (policy,)).outcomes[policy]
        observed = outcome.accepted_tokens / outcome.draft_tokens
        note = f"accepted over drafted, which SmartSpec goes by: {observed:.3f}; mean {np.mean(outcome.lengths):.2f}"
        usual = float(np.median(_late(outcome.lengths)))
        yield exactly(f"{policy}: acceptance {_RIGHT} forces {MOST}", usual, MOST, note)


def _late(lengths: Sequence[float]) -> Sequence[float]:
    """The second half: a policy has learnt by then."""
    return lengths[len(lengths) // 2 :]


def _never_slower(context: Context) -> Iterator[Row]:
    """Goodput over no look-ahead at every load."""
    found = loads(context, POLICIES)
    for policy in POLICIES:
        ratios = {load.name: load.outcomes[policy].goodput / load.outcomes[NONE].goodput for load in found}
        worst = min(ratios, key=lambda name: ratios[name])
        note = f"worst of {len(found)} loads: {worst}; best {max(ratios.values()):.2f}"
        yield at_least(f"{policy}: goodput over none", ratios[worst], 0.99, note)


run = suite(_goodput, _zero, _controls, _never_slower)
