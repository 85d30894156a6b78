"""What RAPID's draft model reads of a long prompt (2502.20330): its beginning, the chunks that the question is about,
the question, and everything generated so far.

The beginning holds the template and the tokens that attention sinks into; the question is the prompt's end. What lies
between is cut into chunks, of which the retriever's best go in, in the order of the prompt, up to a number of tokens.
A prompt that is no longer than all that together is read whole. The choice is made once for a request.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.draft.retrievers.registry import Retriever
from paceline.engine.request import Request

logger = logging.getLogger(__name__)
_LEAST_WORDS = 3
"""Of a last paragraph that is taken for the question."""


@dataclass(frozen=True, slots=True)
class ReadingLimits:
    """How much is read, in tokens."""

    start: int
    chunk: int
    budget: int
    """Of all retrieved chunks together."""
    question: int

    @property
    def longest_prompt(self) -> int:
        """Most prompt tokens that are ever read."""
        return self.start + self.budget + self.question


class RetrievedText:
    """The short text of every request.

    Args:
        retriever: chooses chunks. If it fails, a warning is logged, once, and the request's draft model reads
            beginning and question only.
        tokenizer: the target's, which is the draft model's.
        limits: how much is read.
    """

    def __init__(self, retriever: Retriever, tokenizer: Any, limits: ReadingLimits) -> None:
        self.retriever = retriever
        self.limits = limits
        self._tokenizer = tokenizer
        self._short: dict[Request, list[int]] = {}
        self._errors: dict[Request, Exception] = {}
        self._warned = False

    def tokens(self, request: Request) -> Sequence[int]:
        """The short prompt, and what was generated."""
        if request.prompt_len <= self.limits.longest_prompt:
            return request.token_ids
        return [*self._prompt(request), *request.output_ids]

    def error(self, request: Request) -> Exception | None:
        """Why nothing could be retrieved for this request, if the retriever failed."""
        return self._errors.get(request)

    def forget(self, request: Request) -> None:
        """Drop a finished request's short text."""
        self._short.pop(request, None)
        self._errors.pop(request, None)

    def _prompt(self, request: Request) -> list[int]:
        if request not in self._short:
            leader = request.leader
            if leader in self._short and leader not in self._errors:  # a sample of the same prompt
                self._short[request] = self._short[leader]
            else:
                self._short[request] = self._shorten(request)
        return self._short[request]

    def _shorten(self, request: Request) -> list[int]:
        prompt = request.token_ids[: request.prompt_len]
        end = len(prompt) - self.limits.question
        starts = range(self.limits.start, end, self.limits.chunk)
        chunks = [prompt[at : min(at + self.limits.chunk, end)] for at in starts]
        try:
            chosen = self._choose(prompt[end:], chunks)
        except Exception as error:
            self._errors[request] = error
            if not self._warned:
                logger.warning("retrieval failed; drafts go without it: %s", error, exc_info=error)
                self._warned = True
            chosen = []
        return [*prompt[: self.limits.start], *(token for i in chosen for token in chunks[i]), *prompt[end:]]

    def _choose(self, question: Sequence[int], chunks: Sequence[Sequence[int]]) -> list[int]:
        """Numbers of the chunks that fit best and into the budget, in the prompt's order."""
        texts = self._tokenizer.batch_decode([list(chunk) for chunk in chunks], skip_special_tokens=True)
        query = question_of(self._tokenizer.decode(list(question), skip_special_tokens=True))
        scores = self.retriever.scores(query, texts).tolist()
        chosen, left = list[int](), self.limits.budget
        for i in sorted(range(len(chunks)), key=lambda i: (-scores[i], i)):
            if scores[i] > 0.0 and len(chunks[i]) <= left:
                chosen.append(i)
                left -= len(chunks[i])
        return sorted(chosen)


def question_of(text: str) -> str:
    """The last paragraph of a prompt's end, which is where a question stands; the whole end if that says too little."""
    last = text.rstrip().rpartition("\n\n")[2]
    return last if len(last.split()) >= _LEAST_WORDS else text
