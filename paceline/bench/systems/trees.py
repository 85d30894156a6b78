"""What the tests of tree systems share: rounds at the same contexts, and differences of what they accept.

The rounds are those of `paceline.bench.tree_rounds`. What so few of them cannot tell is said to be undecided: a
row holds or fails only by more than two standard errors. `benchmarks/tree_rules.py` makes many.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from paceline.arrays import FloatArray
from paceline.bench.systems.base import Row, at_least
from paceline.bench.systems.context import Context
from paceline.bench.tree_rounds import Round, TreeRounds, Trial, Walkers, learn_ranks
from paceline.config import SamplingParams
from paceline.draft.shapes.base import TreeShape

_ANSWER = 64
_TOGETHER = 8
_LONGEST = 384
_KV_BYTES = 768 << 20
_SEEDS = 1 << 40
_SLACK = 0.02
"""Share of its length by which a tree may fall behind and count as no shorter: equal ones would never be decided."""
Rounds = Mapping[Trial, Sequence[Round]]


def tree_rounds(context: Context) -> TreeRounds:
    """Rounds of the target and the draft model, for one system."""
    return TreeRounds(context.llm(kv_cache_memory=_KV_BYTES), context.draft_llm)


def _prompts(context: Context) -> list[list[int]]:
    """All questions that leave room for the rows that are kept at a context."""
    return [prompt for prompt in context.prompts(len(context.questions)) if len(prompt) <= _LONGEST]


def try_trees(
    context: Context,
    trials: Sequence[Trial],
    contexts: int,
    temperature: float,
    *,
    ranks: Mapping[str, FloatArray] | None = None,
    shapes: Mapping[Trial, TreeShape] | None = None,
) -> Rounds:
    """One round of every trial at every context, along the target's own answers.

    Args:
        context: gives models and questions.
        trials: what is tried.
        contexts: how many.
        temperature: of the requests.
        ranks: Sequoia's vectors by rule.
        shapes: in place of the trial's own.
    """
    rounds = tree_rounds(context)
    for trial, shape in (shapes or {}).items():
        rounds.use(trial, shape)
    params = SamplingParams(temperature=temperature, max_tokens=_ANSWER, ignore_eos=True)
    walkers = Walkers(rounds, _prompts(context)[::2], params, min(_TOGETHER, contexts))
    seeds = itertools.count(_SEEDS + round(temperature * 1000))
    found: dict[Trial, list[Round]] = {trial: [] for trial in trials}
    count = len(walkers.requests)
    for done in range(0, contexts, count):
        context.say(f"Trees at temperature {temperature:g}: {done} of {contexts} contexts")
        for trial, made in found.items():
            vector = (ranks or {}).get(trial.rule) if trial.tree == "sequoia" else None
            made += rounds.run(walkers.requests, trial, list(itertools.islice(seeds, count)), vector)
        walkers.move_on(found[trials[-1]][-count:])
    walkers.close()
    return found


def ranks_of(
    context: Context, rules: Sequence[str], temperature: float, nodes: int, depth: int
) -> dict[str, FloatArray]:
    """Positional vectors by rule, learned at other contexts than those of `try_trees`."""

    def learn() -> dict[str, FloatArray]:
        context.say(f"Acceptance by sibling rank at temperature {temperature:g}")
        rounds = tree_rounds(context)
        params = SamplingParams(temperature=temperature, max_tokens=_ANSWER, ignore_eos=True)
        walkers = Walkers(rounds, _prompts(context)[1::2], params, context.few(_TOGETHER, 2))
        trial = Trial("sequoia", "", nodes, depth)
        seeds = itertools.count(2 * _SEEDS + round(temperature * 1000))
        return learn_ranks(rounds, walkers, rules, trial, seeds, context.few(64 * _TOGETHER, 4))

    found: dict[str, FloatArray] = context.once(("ranks", tuple(rules), temperature, nodes, depth), learn)
    return found


def lengths(rounds: Sequence[Round]) -> FloatArray:
    """Tokens committed by each round.  # [rounds]"""
    return np.array([len(one.walk.tokens) for one in rounds], dtype=np.float64)


def error_of_mean(values: FloatArray) -> float:
    """Standard error of a mean over contexts, of whole tokens: as if at least one context had differed by one."""
    if len(values) < 2:
        return float("inf")
    return max(float(values.std(ddof=1) / np.sqrt(len(values))), 1.0 / len(values))


def decided(row: Row, error: float) -> Row:
    """The row, undecided (`passed: null`) where its figure lies within two standard errors of the bound.

    Args:
        row: against a bound written as `>= 0.7` or `<= 0.7`.
        error: standard error of its figure.
    """
    bound = float(row.threshold.split()[-1])
    assert isinstance(row.figure, float)
    open_ = abs(row.figure - bound) < 2.0 * error
    note = f"{row.note}{'; ' if row.note else ''}standard error {error:.3f}"
    return replace(row, passed=None if open_ else row.passed, note=f"{note}: undecided" if open_ else note)


def no_shorter(test: str, better: Sequence[Round], worse: Sequence[Round], note: str = "") -> Row:
    """A row that passes if the first is at most 2% shorter than the second, at the same contexts."""
    gap = lengths(better) - lengths(worse)
    about = f"{lengths(better).mean():.2f} and {lengths(worse).mean():.2f} tokens a round over {len(gap)} contexts"
    bound = -round(_SLACK * float(lengths(worse).mean()), 3)
    row = at_least(test, float(gap.mean()), bound, f"{about}{'; ' if note else ''}{note}")
    return decided(row, error_of_mean(gap))
