"""What a grammar still allows of one request's text: the protocol that stages see, without any grammar library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from paceline.arrays import BoolArray, IntArray


@dataclass(frozen=True, slots=True)
class Jump:
    """Text that a constraint dictates after the committed tokens.

    The first `forced` tokens are the only ones allowed where they stand; the others spell text that must come, in the
    tokenizer's own words, though the same text could be spelt with other tokens.
    """

    tokens: tuple[int, ...] = ()
    forced: int = 0


class Constraint(Protocol):
    """The state of one request's grammar after its committed tokens.

    Only commit calls `advance`; everything else leaves the state as it is. A path is the tokens of a draft from the
    root down. Every call may raise `RequestError`, which ends this request and no other.
    """

    @property
    def finished(self) -> bool:
        """Whether nothing more may come but an end token, or one came."""
        ...

    def allowed(self, path: Sequence[int] = ()) -> BoolArray | None:
        """Which tokens may follow the committed ones and `path`; None where an end token has ended the text.

        # [vocab]
        """
        ...

    def surviving(self, tokens: IntArray, parents: IntArray) -> IntArray:
        """The nodes of a draft tree that are allowed and whose ancestors all are, ascending.

        Args:
            tokens: # [n]
            parents: -1 is the root.  # [n]
        """
        ...

    def jump(self, budget: int) -> Jump:
        """The text that must come next, in at most `budget` tokens; empty where the model has a choice."""
        ...

    def advance(self, token: int) -> None:
        """Commit a token."""
        ...

    def fork(self) -> Constraint:
        """An independent copy, for another sample of the same prompt."""
        ...
