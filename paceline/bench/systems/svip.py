"""SVIP (2411.18462): a draft model stops when its entropy is high. Compared on recorded chains at equal length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from paceline.bench.systems.base import Row, at_least, at_most, suite
from paceline.bench.systems.chains import LONGEST, Chains, matched, recorded, stopped_chain
from paceline.bench.systems.chen import EXACT
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import greedy_identity
from paceline.bench.systems.real_laws import law_error
from paceline.plan.svip import EntropyStop
from paceline.verify.coupled import CoupledRule
from paceline.verify.rejection import RejectionRule

_C = 0.15
_POINTS = 0.05


TEMPERATURES = (0.1, 1.0)
"""All but greedy (at 0 no rule weighs a draft), and where being accepted is a matter of luck besides."""


def _correlation(context: Context) -> Iterator[Row]:
    """Entropy against acceptance."""
    for temperature in TEMPERATURES:
        yield _correlated(recorded(context, temperature), f"temperature {temperature:g}")


def _correlated(chains: Chains, where: str) -> Row:
    tested = np.arange(LONGEST) <= chains.accepted[:, None]  # up to the first rejection
    accepted = np.arange(LONGEST) < chains.accepted[:, None]
    found = float(np.corrcoef(chains.entropy[tested], accepted[tested])[0, 1])
    return at_most(f"corr(entropy, acceptance), {where}", found, -0.3, f"{int(tested.sum())} tested tokens")


def _equal_length(context: Context) -> Iterator[Row]:
    """Accepted per drafted token at equal mean drafted length."""
    for temperature in TEMPERATURES:
        yield from _compared(recorded(context, temperature), f"temperature {temperature:g}")


def _compared(chains: Chains, where: str) -> Iterator[Row]:
    mean = float(chains.heuristic().mean())
    lengths = matched(chains, lambda h: lambda: EntropyStop(h, _C), mean)
    rate, mean = chains.rate(lengths), float(lengths.mean())
    note = f"{rate:.3f} at {mean:.2f} drafted tokens a step, {len(lengths)} steps"
    constant, heuristic = chains.constant(mean), chains.rate(chains.heuristic())
    yield at_least(
        f"accepted/drafted above constant K, {where}", rate - constant, _POINTS, f"{note}; constant {constant:.3f}"
    )
    yield at_least(
        f"accepted/drafted above the heuristic, {where}", rate - heuristic, _POINTS, f"{note}; it {heuristic:.3f}"
    )
    shuffled = _shuffled(chains)
    lengths = matched(shuffled, lambda h: lambda: EntropyStop(h, _C), mean)
    gain = shuffled.rate(lengths) - shuffled.constant(float(lengths.mean()))
    yield at_most(
        f"control: shuffled entropies above constant K, {where}", gain, 0.02, f"at {lengths.mean():.2f} drafted tokens"
    )
    published = chains.lengths(lambda: EntropyStop(0.3, _C))
    gain = chains.rate(published) - chains.constant(float(published.mean()))
    note = f"h = 0.3: {published.mean():.2f} drafted tokens a step, {chains.rate(published):.3f} of them accepted"
    yield at_least(f"accepted/drafted above constant K, as published, {where}", gain, _POINTS, note)


def _shuffled(chains: Chains) -> Chains:
    """The same entropies, dealt out anew."""
    mixed = np.random.default_rng(0).permutation(chains.entropy.ravel()).reshape(-1, LONGEST)
    told = tuple(
        tuple(replace(p, entropy=mixed[i, j : j + 1]) for j, p in enumerate(chain))
        for i, chain in enumerate(chains.progress)
    )
    return Chains(told, chains.accepted)


def _laws(context: Context) -> Iterator[Row]:
    """E1: the committed law by enumeration."""
    for rule in (RejectionRule(), CoupledRule()):
        error, places = law_error(context, rule, lambda q: stopped_chain(q, EntropyStop(0.3, _C), 2))
        yield at_most(f"E1: law of {rule.name}, largest error", error, EXACT, f"{places} contexts, every outcome")


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield greedy_identity(context, context.llm(context.draft("max=8@svip"), rule="rejection", tree="chain"))[0]


run = suite(_correlation, _equal_length, _laws, _identity)
