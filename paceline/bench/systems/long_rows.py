"""What target and draft model say along answers to long prompts; what the prompts have in common is computed once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.arrays import FloatArray
from paceline.bench.systems.context import Context, tokens_of
from paceline.bench.systems.long_prompts import long_prompts
from paceline.bench.systems.real_laws import RealLaws, laws_at
from paceline.config import SamplingParams
from paceline.draft.reading import Reading
from paceline.draft.transfer import transferred
from paceline.engine.request import Request
from paceline.llm import LLM
from paceline.model.runner import ForwardBatch, SequenceInput

_CHUNK = 512


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A long prompt and what the target says to it, greedily."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    def short(self, reading: Reading, count: int) -> list[int]:
        """What a draft model reads before the answer's token number `count`."""
        committed = [*self.prompt, *self.tokens[:count]]
        return list(reading.tokens(Request("long", committed, len(self.prompt), SamplingParams(), 0)))


class LongAnswers:
    """Long prompts, the target's answers, and its logits along them.

    Args:
        context: gives the model.
        length: tokens of the long text.
        count: prompts.
        tokens: of an answer.
        options: of the plain engine, which must hold the prompts.
    """

    def __init__(self, context: Context, length: int, count: int, tokens: int, **options: Any) -> None:
        self._context, self._tokens, self._options = context, tokens, options
        self.prompts = long_prompts(context.llm(), length, count)

    @property
    def llm(self) -> LLM:
        """The plain engine."""
        return self._context.llm(**self._options)

    @cached_property
    def answers(self) -> list[Answer]:
        """One for each prompt; the first computes what they have in common."""
        params = SamplingParams(temperature=0.0, max_tokens=self._tokens)
        found = []
        for i, prompt in enumerate(self.prompts):
            self._context.say(f"Plain answers to long prompts ({i} of {len(self.prompts)})")
            found.append(Answer(tuple(prompt), tokens_of(self.llm.generate(prompt, params))[0]))
        return found

    def step_seconds(self, prompt: Sequence[int]) -> float:
        """Of a forward of one token behind a prompt whose KV is cached."""
        with _kept(self.llm, prompt, len(prompt)) as (table, start):
            for at in range(start, len(prompt), _CHUNK):
                part = prompt[at : at + _CHUNK]
                self.llm.engine.runner.forward(ForwardBatch((_plain(part, at, table),), []))
            last = _plain(prompt[-1:], len(prompt) - 1, table)
            started = time.perf_counter()
            self.llm.engine.runner.forward(ForwardBatch((last,), [0]))
            return time.perf_counter() - started

    @cached_property
    def target_rows(self) -> list[torch.Tensor]:
        """The target's logits before every token of every answer.  # [answer, vocab] each"""
        return [rows_before(self.llm, [*a.prompt, *a.tokens], len(a.tokens)) for a in self.answers]

    def draft_rows(self, reading: Reading) -> list[torch.Tensor]:
        """The same of the target as its own draft model that reads so."""
        texts = [a.short(reading, len(a.tokens)) for a in self.answers]
        return [rows_before(self.llm, text, len(a.tokens)) for text, a in zip(texts, self.answers, strict=True)]

    def laws(self, reading: Reading, count: int) -> list[RealLaws]:
        """Laws of two tokens at places spread over the answers, of the target and of the draft model."""
        each = -(-count // len(self.answers))
        found = []
        for answer in self.answers:
            for at in np.linspace(0, len(answer.tokens) - 1, each).astype(int).tolist():
                whole, short = [*answer.prompt, *answer.tokens[:at]], answer.short(reading, at)
                found.append(laws_at(partial(_next_rows, self.llm, whole), partial(_next_rows, self.llm, short)))
        return found[:count]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two laws at many places."""

    acceptance: float
    """Mean of sum min(p, q): how often rejection sampling accepts."""
    divergence: float
    """Mean KL(p || q), in nats."""


def agreement(target: Sequence[torch.Tensor], draft: Sequence[torch.Tensor], strength: float = 0.0) -> Agreement:
    """Of the declared target with the draft model, over all rows."""
    overlaps, divergences = list[FloatArray](), list[FloatArray]()
    for z, d in zip(target, draft, strict=True):
        p = transferred(z.double(), d.double(), strength).log_softmax(-1)
        q = d.double().log_softmax(-1)
        overlaps.append(torch.minimum(p.exp(), q.exp()).sum(-1).numpy())
        divergences.append((p.exp() * (p - q)).sum(-1).numpy())
    return Agreement(float(np.concatenate(overlaps).mean()), float(np.concatenate(divergences).mean()))


def rows_before(llm: LLM, tokens: Sequence[int], count: int) -> torch.Tensor:
    """Logits before each of the last `count` tokens.  # [count, vocab]"""
    read = tokens[:-1]
    with _kept(llm, read, len(read)) as (table, start):
        rows = []
        start = min(start, len(read) - count)
        for at in range(start, len(read), _CHUNK):
            part = read[at : at + _CHUNK]
            wanted = [i for i in range(len(part)) if at + i >= len(read) - count]
            rows.append(llm.engine.runner.forward(ForwardBatch((_plain(part, at, table),), wanted)).float().cpu())
        return torch.cat([row.clone() for row in rows])


def _next_rows(llm: LLM, prefix: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits after a prefix, then after it with each of the tokens.  # [1 + len(tokens), vocab]"""
    with _kept(llm, prefix, len(prefix) + len(tokens)) as (table, start):
        run = llm.engine.runner.forward
        start = min(start, len(prefix) - 1)
        for at in range(start, len(prefix), _CHUNK):
            part = prefix[at : at + _CHUNK]
            rows = [run(ForwardBatch((_plain(part, at, table),), [len(part) - 1])).clone()]
        if tokens:
            each = np.eye(len(tokens), dtype=np.bool_)
            after = SequenceInput(tokens, np.full(len(tokens), len(prefix)), len(prefix), table, each)
            rows.append(run(ForwardBatch((after,), range(len(tokens)))).clone())
        return np.concatenate([row.float().cpu().numpy() for row in rows])


@contextmanager
def _kept(llm: LLM, tokens: Sequence[int], room: int) -> Iterator[tuple[list[int], int]]:
    """A block table with room, and how many leading tokens are in it already. All must be computed at the end."""
    blocks = llm.engine.stages.scheduler.blocks
    table, hashes = blocks.match_prefix(list(tokens), "")
    start = len(table) * blocks.block_size
    try:
        if not blocks.grow(table, room):
            raise MemoryError("the KV cache has no room for a long prompt")
        yield table, start
        blocks.publish(table, hashes, list(tokens), len(tokens), "")
    finally:
        blocks.release(table)


def _plain(tokens: Sequence[int], start: int, table: Sequence[int]) -> SequenceInput:
    return SequenceInput(tokens, np.arange(start, start + len(tokens)), start, table)
