"""A speculator for a draft model: guesses what the draft model will say, so that one forward scores several levels.

Whatever is guessed, the draft stays the same: a node of the tree that was scored ahead costs no forward, a guess that
becomes no node costs its share of the forward it was in. So a draft model can itself be served by a token-reading
drafter (Staged 2308.04623), and phrases can be drafted at once (Ouroboros 2402.13720).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from paceline.engine.request import Request


class Guesser(Protocol):
    """Guesses continuations of a path."""

    most: int
    """Tokens it guesses at most for a request in one forward."""

    def guess(self, request: Request, path: Sequence[int], most: int, depth: int) -> Iterable[Sequence[int]]:
        """Continuations that the draft model may want after the committed tokens and `path`.

        Args:
            request: whose draft it is.
            path: the draft so far, from the root down.
            most: tokens of all continuations together, a shared beginning counted once; what is beyond is left out.
            depth: longest useful continuation.

        Returns:
            Chains, the best first.
        """
        ...

    def learn(self, request: Request, path: Sequence[int], likeliest: Sequence[int]) -> None:
        """Take in a finished round.

        Args:
            request: whose draft it was; its committed tokens are still those that the draft followed.
            path: the first path of the draft.
            likeliest: the draft model's likeliest token after the root and after every node of the path, as far as
                the path was scored.
        """
        ...

    def forget(self, request: Request) -> None:
        """Drop the request's state."""
        ...
