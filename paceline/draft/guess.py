"""A speculator for a draft model: guesses what the draft model will say, so that one forward scores several levels.

Whatever is guessed, the draft stays the same: a node of the tree that was scored ahead costs no forward, a guess that
becomes no node costs its share of the forward it was in. So a draft model can itself be served by a token-reading
drafter (Staged 2308.04623), and phrases can be drafted at once (Ouroboros 2402.13720).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paceline.engine.request import Request


class Guesser(Protocol):
    """Guesses continuations of a path."""

    most: int
    """Tokens it guesses at most for a request in one forward."""

    def guess(self, request: Request, path: Sequence[int]) -> Sequence[Sequence[int]]:
        """Continuations, each a chain, that the draft model may want after the committed tokens and `path`."""
        ...

    def learn(self, request: Request, path: Sequence[int], likeliest: Sequence[int]) -> None:
        """Take in a finished round: the first path of the draft, and the draft model's likeliest token after the
        root and after every node of it."""
        ...

    def forget(self, request: Request) -> None:
        """Drop the request's state."""
        ...
