"""Recorded chains of a draft model, on which every way to stop is compared at equal mean drafted length.

One run drafts a fixed number of tokens at every step under the rule `rejection` and notes what a stop could have seen
after each draft forward, and how many tokens were accepted. A stop that would have ended a chain after k tokens drafts
k and gets the accepted ones among the first k: all stops see the same chains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.bench.laws import Draft, LawOf
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import WatchedRejection, count, with_rule
from paceline.config import SamplingParams
from paceline.draft.base import Proposal, chain
from paceline.engine.draft_progress import DraftProgress, KeepDrafting
from paceline.engine.request import Request
from paceline.engine.rng import Stream
from paceline.engine.sampling import Law
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import LengthPolicy
from paceline.verify.rejection import RejectionRule

LONGEST = 12
"""Tokens of a chain."""
QUESTIONS = 14
"""Chains are recorded on the first so many."""
_VOCAB = 16
_ROOT = np.zeros(1, dtype=np.int64)


class _Recorder:
    """A policy that lets everyone go on, and what it was told of every chain."""

    wants_hidden = True
    wants_top_probabilities = True

    def __init__(self, inner: LengthPolicy) -> None:
        self._inner = inner
        self.chains: list[list[DraftProgress]] = []

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """The inner plan, listened to."""
        return replace(self._inner.plan(batch, max_model_len), keep_drafting=self)

    def keep(self, progress: DraftProgress) -> BoolArray:
        """Everyone (it is one request)."""
        if progress.depth == 1:
            self.chains.append([])
        self.chains[-1].append(progress)
        return np.ones(len(progress.rows), dtype=np.bool_)

    def learn(self, stats: StepStats) -> None:
        """Pass it on."""
        self._inner.learn(stats)

    def forget(self, request: Request) -> None:
        """Pass it on."""
        self._inner.forget(request)


@dataclass(frozen=True, eq=False)
class Chains:
    """Recorded chains, in the order of their steps."""

    progress: tuple[tuple[DraftProgress, ...], ...]
    """Of every chain, after each of its forwards."""
    accepted: IntArray  # [n], of the first `LONGEST` tokens

    @property
    def entropy(self) -> FloatArray:
        """Of the law of every token.  # [n, LONGEST]"""
        return np.array([[p.entropy[0] for p in chain] for chain in self.progress])

    def lengths(self, make: Callable[[], KeepDrafting]) -> IntArray:
        """Tokens that a stop would have drafted.  # [n]"""
        found = []
        for recorded in self.progress:
            stop = make()
            answers = (replace(p, rows=_ROOT) for p in recorded)
            found.append(next((i for i, p in enumerate(answers, 1) if not stop.keep(p)[0]), LONGEST))
        return np.array(found)

    def rate(self, lengths: IntArray) -> float:
        """Accepted per drafted token."""
        return float(np.minimum(self.accepted, lengths).sum() / lengths.sum())

    def mean_accepted(self, lengths: IntArray) -> float:
        """Accepted tokens per step."""
        return float(np.minimum(self.accepted, lengths).mean())

    def constant(self, mean: float) -> float:
        """Accepted per drafted token of a constant length; between whole ones, of a mixture of both."""
        low = int(np.clip(np.floor(mean), 1, LONGEST - 1))
        short, long = (np.minimum(self.accepted, k).mean() for k in (low, low + 1))
        share = np.clip(mean - low, 0.0, 1.0)
        return float(((1.0 - share) * short + share * long) / (low + share))

    def heuristic(self) -> IntArray:
        """Lengths of the heuristic of transformers: two more after full acceptance, else one less.  # [n]"""
        lengths, length = [], 5
        for accepted in self.accepted.tolist():
            lengths.append(min(length, LONGEST))
            length = min(length + 2, LONGEST) if accepted >= lengths[-1] else max(length - 1, 1)
        return np.array(lengths)


def recorded(context: Context, temperature: float = 1.0) -> Chains:
    """Chains on questions of all tasks, made once."""
    found: Chains = context.once(("chains", temperature), lambda: _record(context, temperature))
    return found


def _record(context: Context, temperature: float) -> Chains:
    llm = context.llm(context.draft(f"k={LONGEST + 1}"), rule="rejection", tree="chain")
    stages, rule = llm.engine.stages, WatchedRejection()
    assert stages.policy is not None
    recorder = _Recorder(stages.policy)
    llm.engine.stages = replace(stages, policy=recorder)
    context.say(f"Recording chains of the draft at temperature {temperature:g}")
    try:
        params = SamplingParams(temperature=temperature, max_tokens=context.few(160, 32), seed=5)
        count(with_rule(llm, rule), context.prompts(context.few(QUESTIONS, 6)), params)
    finally:
        llm.engine.stages = stages
        with_rule(llm, RejectionRule())
    # After the last token nobody is asked: a chain of one token was not heard of, and others end one short.
    walked = [r - 1 for r, drafted in zip(rule.rounds, rule.drafted, strict=True) if drafted > 1]
    whole = [(c, n) for c, n in zip(recorder.chains, walked, strict=True) if len(c) >= LONGEST]
    return Chains(tuple(tuple(c[:LONGEST]) for c, _ in whole), np.array([min(n, LONGEST) for _, n in whole]))


def matched(chains: Chains, make: Callable[[float], Callable[[], KeepDrafting]], mean: float) -> IntArray:
    """Lengths of a stop whose threshold (larger: longer, from 0 to 1) is chosen so that they have this mean.  # [n]"""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2.0
        if chains.lengths(make(middle)).mean() < mean:
            low = middle
        else:
            high = middle
    return chains.lengths(make(high))


def stopped_chain(q: LawOf, stop: KeepDrafting, length: int) -> Draft:
    """Tokens drawn from q until a stop that reads the newest law says no."""

    def draft(path: tuple[int, ...], noise: object, position: int) -> Proposal:
        tokens, laws = list[int](), list[Law]()
        while len(tokens) < length:
            law = q((*path, *tokens))
            tokens.append(law.draw(noise.words(position + len(tokens), Stream.DRAFT, 0)))  # type: ignore[attr-defined]
            laws.append(law)
            if not stop.keep(_told(law, len(tokens)))[0]:
                break
        return chain(tokens, [0] * len(tokens), tuple(laws))

    return draft


def _told(law: Law, depth: int) -> DraftProgress:
    q = np.sort(law.probabilities(_VOCAB))[::-1]
    positive = q[q > 0.0]
    one = np.ones(1)
    return DraftProgress(
        depth=depth,
        rows=_ROOT,
        nodes=np.array([depth]),
        survival=one,
        chain_survival=one,
        entropy=np.array([float(-(positive * np.log(positive)).sum())]),
        confidence=q[:1],
        hidden=torch.zeros(1, 1),
        top_probabilities=q[None, :10],
    )
