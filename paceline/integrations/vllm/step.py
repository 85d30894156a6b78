"""The values that go between vLLM's scheduler and the controller in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.arrays import FloatArray
from paceline.engine.request import Request


@dataclass(frozen=True, slots=True)
class Method:
    """What the controller must know of vLLM's drafter."""

    name: str
    most: int
    """The server's `num_speculative_tokens`."""
    forwards: bool = False
    """Whether a draft takes forwards of its own, one for each position."""
    steerable: bool = True
    """Whether the scheduler can say how much to draft."""
    shows_drafts: bool = True
    """Whether the scheduler sees draft tokens before it schedules them (sync scheduling)."""
    lengths: tuple[int, ...] | None = None
    """Lengths of which every step takes one for the whole batch; None: every request has its own."""


@dataclass(slots=True)
class Step:
    """A step that is planned anew, from its answer to its result."""

    requests: tuple[Request, ...]
    """Those that decode."""
    drafted: list[int]
    """Draft tokens that there were.  # [len(requests)]"""
    kept: list[int]
    """Draft tokens verified.  # [len(requests)]"""
    asked: int
    """Asked for in the step before, so verified or trimmed in this one."""
    asks: int
    """Asked for in this step."""
    price: float | None = None
    """Survival of the last draft token that was worth its slot."""
    chances: FloatArray | None = None
    """Of each position, given that those before were right; None: nobody had drafts.  # [len(requests), num_keys]"""
    spent: float = 0.0
    """Seconds that planning it and reading its result took."""
    tokens: Sequence[Sequence[int]] = ()
    """The draft tokens, where they are known, to tell afterwards whether the first trimmed one was right."""

    def was_right(self, row: int, committed: Sequence[int]) -> bool:
        """Whether a request's first trimmed draft token is the one that came behind the verified ones."""
        if not self.tokens:
            return False
        kept, draft = self.kept[row], self.tokens[row]
        return len(committed) == kept + 1 and len(draft) > kept and draft[kept] == committed[kept]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a step."""

    rows: list[int]
    """Requests (numbers in `Step.requests`) that have tokens."""
    committed: list[int]
    """Tokens of each of them."""
    hits: list[bool]
    """Of each of them, whether its first trimmed draft token was right."""
    num_prompt_tokens: int
    num_sequences: int
    seconds: float
    draft_seconds: float = 0.0
    """What the drafter says itself; 0: nothing."""
