"""What is asked: prompts from a question file and the output length that each request wants.

Without a trace a request is one question through the chat template. With a trace it has the trace's context length: a
longer question is cut, and a shorter one gets the questions that follow it in the pool in front, so that text repeats
only once the pool is used up (repeating one question would flatter every drafter that looks text up).

The prompts are shuffled anew for every repeat; within a repeat all settings get the same requests in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from paceline.bench.arrivals import TraceRow
from paceline.bench.spec import Question

_MARK = "\u2603"
"""Stands for the user's text in a rendered chat template; no template holds it."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request, before it is known who answers it."""

    index: int
    prompt: str | tuple[int, ...]
    """The user's text, or token ids ready for the model."""
    max_tokens: int


class Prompts(Protocol):
    """Makes prompts for one kind of client."""

    def plain(self, text: str) -> str | tuple[int, ...]:
        """A question as it stands."""
        ...

    def sized(self, texts: Sequence[str], length: int) -> str | tuple[int, ...]:
        """A prompt of `length` tokens that ends with the first of `texts`, the others going in front as needed."""
        ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a trace's lengths become those that this machine can run.

    `scale` multiplies both lengths; `max_context` and `max_output` cap them afterwards.
    """

    scale: float = 1.0
    max_context: int | None = None
    max_output: int | None = None

    def of(self, row: TraceRow) -> tuple[int, int]:
        """Prompt tokens and output tokens of one request, at least 1 each."""
        context, output = (max(1, round(n * self.scale)) for n in (row.context, row.generated))
        return min(context, self.max_context or context), min(output, self.max_output or output)


@dataclass(frozen=True, slots=True)
class Workload:
    """All that decides the requests of a run but the client.

    Args:
        questions: the pool; only first turns are asked.
        max_tokens: output tokens of a request without a trace.
        seed: shuffles the pool, together with the repeat.
        trace: lengths of the requests, in order of arrival.
        lengths: applied to the trace.
    """

    questions: tuple[Question, ...]
    max_tokens: int
    seed: int = 0
    trace: tuple[TraceRow, ...] | None = None
    lengths: Lengths = Lengths()

    def requests(self, repeat: int, prompts: Prompts) -> Iterator[Work]:
        """Requests without end (or to the trace's end); the same for the same repeat."""
        order = np.random.default_rng((self.seed, repeat)).permutation(len(self.questions))
        texts = [self.questions[i].turns[0] for i in order]
        if self.trace is None:
            made: dict[int, str | tuple[int, ...]] = {}
            for index in itertools.count():
                place = index % len(texts)
                if place not in made:
                    made[place] = prompts.plain(texts[place])
                yield Work(index, made[place], self.max_tokens)
        else:
            for index, row in enumerate(self.trace):
                context, output = self.lengths.of(row)
                place = index % len(texts)
                yield Work(index, prompts.sized(texts[place:] + texts[:place], context), output)

    def warm_up(self, prompts: Prompts, most: int) -> Work:
        """A short request like those that are measured."""
        work = next(self.requests(0, prompts))
        return replace(work, max_tokens=min(work.max_tokens, most))


class TokenPrompts:
    """Prompts as token ids, exact to the token.

    Args:
        tokenizer: the model's; its chat template is used if it has one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before, self._after = self._template()

    def plain(self, text: str) -> tuple[int, ...]:
        """The question in the chat template."""
        return (*self._before, *self._encode(text), *self._after)

    def sized(self, texts: Sequence[str], length: int) -> tuple[int, ...]:
        """See `Prompts`; a length too short for the template does without it."""
        room = length - len(self._before) - len(self._after)
        if room < 1:
            return self._body(texts, length)
        return (*self._before, *self._body(texts, room), *self._after)

    def _body(self, texts: Sequence[str], length: int) -> tuple[int, ...]:
        own = self._encode(texts[0])
        if len(own) >= length:
            return tuple(own[:length])
        filler: list[int] = []
        for text in itertools.cycle((*texts[1:], texts[0])):
            filler += self._encode(text + "\n\n")
            if len(filler) + len(own) >= length:
                return (*filler[: length - len(own)], *own)
        raise AssertionError("the pool is never used up")

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _template(self) -> tuple[list[int], list[int]]:
        """Tokens before and after the user's text."""
        if not getattr(self._tokenizer, "chat_template", None):
            return list(self._tokenizer.encode("")), []
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = text.partition(_MARK)
        return self._encode(before), self._encode(after)


class TextPrompts:
    """Prompts as text for a server whose tokenizer is out of reach: lengths hold on average.

    Args:
        characters: of a token, on average, as the server counted them.
        overhead: tokens that the server's chat template adds.
    """

    def __init__(self, characters: float, overhead: float) -> None:
        self._characters = characters
        self._overhead = overhead

    def plain(self, text: str) -> str:
        """The question itself."""
        return text

    def sized(self, texts: Sequence[str], length: int) -> str:
        """See `Prompts`; the server reports how many tokens it really were."""
        size = max(1, round((length - self._overhead) * self._characters))
        own = texts[0]
        if len(own) >= size:
            return own[:size]
        filler = ""
        for text in itertools.cycle((*texts[1:], own)):
            filler += text + "\n\n"
            if len(filler) + len(own) >= size:
                return filler[: size - len(own)] + own
        raise AssertionError("the pool is never used up")
