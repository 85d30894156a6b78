"""Token Recycling (2408.08696): a static tree over the candidates that the target itself gave last time.

Here 32 nodes of the published 80, Paceline's own cap: on a CPU every node costs, and more add little. A matrix is warm
after other questions; every variant answers the same questions after the same warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from paceline.bench.systems.base import Row, above, at_least, at_most, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import Counted, count, greedy_identity, with_drafter
from paceline.config import SamplingParams
from paceline.draft.recycling import RecyclingDrafter
from paceline.engine.types import Observation
from paceline.llm import LLM

NODES = 32
SPEC = f"recycling:k={NODES}"


class ZeroMatrix(RecyclingDrafter):
    """The release's empty matrix, never updated: every successor is token 0."""

    def _empty(self) -> NDArray[np.int32]:
        return np.zeros_like(super()._empty())

    def observe(self, observation: Observation) -> None:
        """Learn nothing."""


class Shuffled(RecyclingDrafter):
    """The right candidates in random order: the template's ranks mean nothing."""

    def __init__(self, *, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size)
        self._random = np.random.default_rng(0)

    def observe(self, observation: Observation) -> None:
        """Learn shuffled rows."""
        if observation.top_ids is not None:
            mixed = self._random.permuted(observation.top_ids, axis=1)
            super().observe(replace(observation, top_ids=mixed))


class AcceptedOnly(RecyclingDrafter):
    """Learns from the nodes on the committed path alone."""

    def observe(self, observation: Observation) -> None:
        """Learn the rows of the root and of what was accepted."""
        if observation.top_ids is None:
            return
        # A row belongs to the path if its token does; of equal tokens in one tree the last wins, as for all nodes.
        kept = [0, *np.flatnonzero(np.isin(observation.row_tokens[1:], observation.committed[:-1])) + 1]
        super().observe(
            replace(observation, row_tokens=observation.row_tokens[kept], top_ids=observation.top_ids[kept])
        )


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain, while the matrix warms up."""
    yield greedy_identity(context, context.fresh_llm(SPEC))[0]


def _variants(context: Context) -> Iterator[Row]:
    """Accepted length warm and cold, and with each idea taken away."""
    warm = _measure(context, "warm").mean_accepted_length
    questions, others = context.few(_MEASURED, 3), context.few(_WARM_UP, 2)
    note = f"{questions} questions x {context.few(*_TOKENS)} tokens after {others} others"
    yield at_least("accepted length, warm", warm, 1.8, f"{note}; {NODES} nodes")
    cold = _measure(context, "cold", warm_up=False).mean_accepted_length
    yield above("warm over cold", warm / cold, 1.0, f"cold: a matrix of its own for every question, {cold:.3f}")
    zero = _measure(context, "zero matrix", ZeroMatrix, few=True).mean_accepted_length
    yield at_most("control: zero matrix", zero, 1.05, "every candidate is token 0 and nothing is learnt")
    shuffled = _measure(context, "shuffled", Shuffled).mean_accepted_length
    yield above("warm over shuffled columns", warm / shuffled, 1.0, f"shuffled: {shuffled:.3f}")
    accepted = _measure(context, "accepted only", AcceptedOnly).mean_accepted_length
    yield above(
        "all nodes over accepted only", warm / accepted, 1.0, f"updated from accepted nodes only: {accepted:.3f}"
    )


_WARM_UP, _MEASURED = 7, 8
_TOKENS = (32, 16)


def _measure(
    context: Context,
    name: str,
    drafter: Callable[..., RecyclingDrafter] | None = None,
    *,
    warm_up: bool = True,
    few: bool = False,
) -> Counted:
    llm = context.fresh_llm(SPEC)
    if drafter is not None:
        with_drafter(llm, drafter(vocab_size=llm.engine.vocab_size))
    before, measured = context.few(_WARM_UP, 2), context.few(_MEASURED, 3)
    prompts = context.prompts(before + measured)
    context.say(name)
    params = SamplingParams(temperature=0.0, max_tokens=context.few(*_TOKENS))
    if few:
        return count(llm, prompts[before : before + 3], params)
    if not warm_up:
        return _each_alone(llm, prompts[before:], params)
    count(llm, prompts[:before], params)
    return count(llm, prompts[before:], params)


def _each_alone(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Counted:
    """Every prompt under a salt of its own, so that none finds what another left."""
    made = [llm.generate([prompt], params, cache_salt=f"alone {i}")[0] for i, prompt in enumerate(prompts)]
    return Counted(
        tuple(tuple(g.token_ids) for g in made),
        sum(g.stats.target_forwards for g in made),
        sum(g.stats.draft_tokens for g in made),
        sum(g.stats.accepted_tokens for g in made),
    )


run = suite(_identity, _variants)
