"""E0 for every drafter: lanes whose draft is one of the engine's drafters that read tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

from paceline.bench.systems.base import Row, exactly
from paceline.bench.systems.context import Context
from paceline.bench.systems.lanes import RealText, params_at
from paceline.config import SamplingParams
from paceline.draft.base import DraftContext, Drafter
from paceline.engine.request import Request
from paceline.lanes.tokens import Guess, Path, Text

DRAFTERS = ("ngram", "suffix", "recycling")
_BUDGET = 4


class FirstNodes:
    """What a drafter proposes first after a path."""

    def __init__(self, drafter: Drafter, prompt: Sequence[int], params: SamplingParams) -> None:
        self._drafter, self._prompt, self._params = drafter, list(prompt), params
        self._numbers = count()

    def guess(self, path: Path, round_id: int) -> Guess | None:  # noqa: ARG002
        """The first node of its proposal; often there is none."""
        name = f"lane-{next(self._numbers)}"
        request = Request(name, [*self._prompt, *path], len(self._prompt), self._params, seed=0)
        (proposal,) = self._drafter.propose([DraftContext(request, _BUDGET)])
        self._drafter.forget(request)
        return Guess(int(proposal.tokens[0])) if len(proposal) else None


def every_drafter(context: Context, name: str, write: Callable[[Text], None]) -> Iterator[Row]:
    """E0: the engine's other drafters in the lane, greedy and at temperature 1."""
    prompts, tokens = context.prompts(context.few(4, 2)), context.few(32, 16)
    same = runs = accepted = 0
    for temperature in (0.0, 1.0):
        params = params_at(temperature, tokens)
        wanted = [tuple(g.token_ids) for g in context.llm().generate(prompts, params)]
        for prompt, output in zip(prompts, wanted, strict=True):
            real = RealText(context, context.draft_llm, prompt, params).remember()
            for drafter in DRAFTERS:
                context.say(f"{name} with {drafter}")
                (made,) = context.llm(drafter).engine.stages.drafting.drafters.values()
                text = real.text(FirstNodes(made, prompt, params))
                write(text)
                same, runs, accepted = same + (text.path == output), runs + 1, accepted + sum(text.streaks)
            real.close()
    note = f"{', '.join(DRAFTERS)}: {len(prompts)} prompts, temperature 0 and 1; {accepted} draft tokens accepted"
    yield exactly(f"E0 for every drafter: {name}, runs with the engine's own text", same, runs, note)
