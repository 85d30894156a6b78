"""The token logic that all schedules share: what is committed, what may be guessed, and the engine's acceptance rule.

A schedule decides *when* a model is asked and for how much; nothing here knows time. Under `coupled` and at temperature
0 the committed token is a function of what stands before it, so every schedule writes the same text. Under rules that
weigh drafts, each position is tested once, against the law its guess was drawn from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paceline.draft.base import NOTHING, chain
from paceline.draft.tree import build
from paceline.engine.draft_tree import DraftTree
from paceline.engine.rng import Noise
from paceline.engine.sampling import Law
from paceline.errors import LaneDiedError
from paceline.verify.base import AcceptanceRule

logger = logging.getLogger(__name__)
Path = tuple[int, ...]
"""Tokens behind the prompt."""
_PRIOR = np.ones(1)
_NOT_KNOWN = Law.point(0)
"""In place of the law after a chain's last token, where it was not asked for: what is drawn from it is dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class Guess:
    """A draft token."""

    token: int
    probability: float = 1.0
    """What the draft gave to its likeliest token."""
    law: Law | None = None
    """What it was drawn from; None: it was chosen, or drawn with the target's own noise."""


class Draft(Protocol):
    """Says what may come next. Each text has its own."""

    def guess(self, path: Path, round_id: int) -> Guess | None:
        """The token after `path`, or None where there is no guess.

        Args:
            path: any continuation of the prompt.
            round_id: tells apart guesses that are drawn anew at one position after a rejection.
        """
        ...


class Target(Protocol):
    """Knows the target's laws. Each text has its own."""

    def laws(self, path: Path, tokens: Path) -> Sequence[Law]:
        """The law after `path`, then after each of `tokens` behind it: one forward.  # [len(tokens) + 1]"""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule says of a chain of guesses."""

    accepted: int
    token: int | None
    """The recovered or bonus token; None where all were accepted and the law after them is not known."""


class Text:
    """One request while a schedule writes it.

    Args:
        target: its laws.
        draft: its guesses.
        rule: the acceptance rule.
        noise: what the rule decides with.
        start: absolute position of the first output token (the prompt's length).
        vocab_size: tokens in the vocabulary.
        limit: most output tokens.
        stop_ids: tokens that end the text.
        unread: prompt tokens that the first target forward has to read; 0: the prompt is read.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft,
        rule: AcceptanceRule,
        noise: Noise,
        *,
        start: int,
        vocab_size: int,
        limit: int,
        stop_ids: Sequence[int] = (),
        unread: int = 0,
    ) -> None:
        self.target = target
        self.path: Path = ()
        self.finished = limit < 1
        self.unread = unread
        self.limit = limit
        self.times: list[float] = []
        """When each token was committed."""
        self.verdicts = 0
        """Verifications that committed tokens."""
        self.streaks: list[int] = [0]
        """Draft tokens accepted in a row, between tokens that the target brought; the last one may go on."""
        self._draft: Draft | None = draft
        self.rule, self._noise = rule, noise
        self._start, self._vocab_size, self._stop_ids = start, vocab_size, frozenset(stop_ids)

    @property
    def has_draft(self) -> bool:
        """Whether there is anybody to guess."""
        return self._draft is not None

    def lose_draft(self, error: Exception) -> None:
        """The lane that drafts is dead, or its draft failed: the text goes on without."""
        if not isinstance(error, LaneDiedError):
            logger.warning("a draft failed; its text goes on without", exc_info=error)
        self._draft = None

    def guesses(self, path: Path, count: int) -> list[Guess]:
        """Up to `count` guesses in a row after a path that goes on from what is committed; drawn anew every round."""
        found: list[Guess] = []
        draft, round_id = self._draft, len(self.path)
        while draft is not None and len(found) < count:
            guess = draft.guess((*path, *tokens_of(found)), round_id)
            if guess is None:
                break
            found.append(guess)
        return found

    def judge(self, guesses: Sequence[Guess], laws: Sequence[Law]) -> Verdict:
        """Test guesses in their order, right behind what is committed.

        Args:
            guesses: the chain.
            laws: the target's after what is committed, and after each guess but perhaps the last: with it, full
                acceptance brings a bonus token.
        """
        assert len(guesses) <= len(laws) <= len(guesses) + 1, "every guess needs the law of its place"

        def law(node: int, path: Sequence[int]) -> Law:  # noqa: ARG001
            return laws[node + 1] if node + 1 < len(laws) else _NOT_KNOWN

        position = self._start + len(self.path)
        walk = self.rule.accept(_tree(guesses), law, self._noise, position, self._vocab_size)
        accepted = len(walk.path)
        known = accepted < len(laws)
        return Verdict(accepted, walk.tokens[-1] if known else None)

    def commit(self, guesses: Sequence[Guess], verdict: Verdict, now: float) -> None:
        """Append what the verdict says, as far as the text goes."""
        tokens = [guess.token for guess in guesses[: verdict.accepted]]
        if verdict.token is not None:
            tokens.append(verdict.token)
        self.verdicts += 1
        self.streaks[-1] += verdict.accepted
        if verdict.token is not None:
            self.streaks.append(0)
        for token in tokens:
            self.path = (*self.path, token)
            self.times.append(now)
            if token in self._stop_ids or len(self.path) >= self.limit:
                self.finished = True
                return


def tokens_of(guesses: Sequence[Guess]) -> Path:
    """Their tokens."""
    return tuple(guess.token for guess in guesses)


def _tree(guesses: Sequence[Guess]) -> DraftTree:
    if not guesses:
        return build("draft", NOTHING, _PRIOR)
    laws = tuple(guess.law for guess in guesses if guess.law is not None)
    assert len(laws) in (0, len(guesses)), "a chain is drawn or chosen as a whole"
    return build("draft", chain(tokens_of(guesses), [0] * len(guesses), laws or None), _PRIOR)
