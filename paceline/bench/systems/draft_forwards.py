"""What systems that spare a draft model's forwards measure: forwards by token, with and without a mechanism."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import Counted, count
from paceline.config import SamplingParams
from paceline.draft.base import DraftContext, Proposal
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.ouroboros import OuroborosDrafter
from paceline.llm import LLM

SpeculatingDrafter = ModelDrafter | OuroborosDrafter


@dataclass(frozen=True, slots=True)
class Spared:
    """What some prompts took."""

    counted: Counted
    draft_forwards: int
    drafted: int
    """Tokens that the draft model drafted."""
    seconds: float

    @property
    def per_token(self) -> float:
        """Draft forwards per output token."""
        return self.draft_forwards / self.counted.tokens

    @property
    def per_drafted(self) -> float:
        """Draft forwards per drafted token."""
        return self.draft_forwards / self.drafted

    @property
    def speed(self) -> str:
        """For a note."""
        return f"{self.counted.tokens / self.seconds:.1f} tok/s"


def drafter_of(llm: LLM) -> SpeculatingDrafter:
    """The engine's only drafter, which has a model."""
    (drafter,) = llm.engine.stages.drafting.drafters.values()
    assert isinstance(drafter, ModelDrafter | OuroborosDrafter)
    return drafter


def spared(context: Context, llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> Spared:
    """Greedy output of the prompts, one by one."""
    drafter = drafter_of(llm)
    runner = (drafter.draft if isinstance(drafter, OuroborosDrafter) else drafter).model.runner
    before, started = runner.num_forwards, time.perf_counter()
    with _counting(drafter) as drafted:
        counted = count(llm, prompts, SamplingParams(temperature=0.0, max_tokens=tokens))
    seconds = time.perf_counter() - started
    context.say(f"Accepted length {counted.mean_accepted_length:.2f}")
    return Spared(counted, runner.num_forwards - before, drafted[0], seconds)


@contextmanager
def _counting(drafter: SpeculatingDrafter) -> Iterator[list[int]]:
    """Counts the nodes of the draft model itself, not what is put behind them."""
    inner = drafter.draft if isinstance(drafter, OuroborosDrafter) else drafter
    total, propose = [0], inner.propose

    def counted(contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        made = propose(contexts)
        total[0] += sum(map(len, made))
        return made

    inner.propose = counted  # type: ignore[method-assign]
    try:
        yield total
    finally:
        del inner.propose
