"""Staged speculative decoding (2308.04623): a tree from a draft model that an n-gram model drafts for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paceline.bench.systems.base import Row, at_least, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.draft_forwards import Spared, drafter_of, spared
from paceline.bench.systems.measures import PROMPTS, TOKENS, greedy_identity
from paceline.config import SamplingParams
from paceline.draft.base import DraftContext
from paceline.draft.model_drafter import ModelDrafter
from paceline.engine.request import Request
from paceline.llm import LLM

LENGTH = 6
TREES = ("chain", "best-first:expand=1")
_WANTED = 0.25
"""Draft forwards that the paper's second stage shall save, from the catalogue."""


def engine(context: Context, options: str = "", tree: str = "chain") -> LLM:
    """A new engine with the draft model; nothing is learnt yet."""
    return context.fresh_llm(context.draft(f"k={LENGTH}{options}"), tree=tree, max_num_seqs=1)


def _identity(context: Context) -> Iterator[Row]:
    """E0: three levels, greedy output equals plain."""
    for tree in TREES:
        yield greedy_identity(context, engine(context, ",guess=ngram", tree), f"E0: three levels, {tree}")[0]


def _middle_pair(context: Context) -> Iterator[Row]:
    """E0: the draft model's own text with the n-gram model and without."""
    prompts = context.prompts(context.few(20, 4))
    texts = [_own_text(engine(context, options), prompts, context.few(48, 18)) for options in ("", ",guess=ngram")]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    yield exactly("E0: middle pair alone", same, len(prompts), "the draft model's greedy text")


def _own_text(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """What the draft model writes if everything is accepted."""
    drafter, texts = drafter_of(llm), list[list[int]]()
    for i, prompt in enumerate(prompts):
        request = Request(f"p{i}", list(prompt), len(prompt), SamplingParams(temperature=0.0, max_tokens=tokens), 0)
        while len(request.token_ids) - len(prompt) < tokens:
            (proposal,) = drafter.propose([DraftContext(request, LENGTH)])
            request.token_ids += proposal.tokens.tolist()
        texts.append(request.token_ids[len(prompt) :])
        drafter.forget(request)
    return texts


class UniformGuesser:
    """Guesses any token: the control."""

    def __init__(self, vocab_size: int, most: int) -> None:
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self.most = most

    def guess(self, request: Request, path: Sequence[int], most: int, depth: int) -> list[list[int]]:  # noqa: ARG002
        """One chain of uniform draws."""
        return [self._rng.integers(0, self._vocab_size, min(most, depth)).tolist()]

    def learn(self, request: Request, path: Sequence[int], likeliest: Sequence[int]) -> None:
        """There is nothing to learn."""

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


def _forwards(context: Context) -> Iterator[Row]:
    """Draft forwards per emitted token, with two levels, three, and a uniform third."""
    prompts, tokens = context.prompts(context.few(*PROMPTS)), context.few(*TOKENS)
    for tree in TREES:
        two = spared(context, engine(context, "", tree), prompts, tokens)
        three = spared(context, engine(context, ",guess=ngram", tree), prompts, tokens)
        control = engine(context, ",guess=ngram", tree)
        drafter = drafter_of(control)
        assert isinstance(drafter, ModelDrafter)
        drafter.use(UniformGuesser(control.engine.vocab_size, 6))
        uniform = spared(context, control, prompts, tokens)
        yield at_least(f"draft forwards saved, {tree}", _saved(two, three), _WANTED, _note(two, three))
        yield exactly(
            f"accepted length as with two levels, {tree}",
            round(three.counted.mean_accepted_length, 6),
            round(two.counted.mean_accepted_length, 6),
        )
        saved = _saved(two, uniform)
        yield Row(f"control: uniform guesses, {tree}", saved, "<= 0.02", saved <= 0.02, _note(two, uniform))


def _saved(two: Spared, three: Spared) -> float:
    return 1.0 - three.per_token / two.per_token


def _note(two: Spared, three: Spared) -> str:
    return f"per token {two.per_token:.2f} -> {three.per_token:.2f}; {two.speed} -> {three.speed}"


run = suite(_identity, _middle_pair, _forwards)
