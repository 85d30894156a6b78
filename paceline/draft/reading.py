"""What a draft model reads of a request: all of its tokens, or a shorter text that ends in the same way.

Positions of the draft model are those of the text it reads. Whatever it reads, it drafts what comes next, so a reading
changes how often a draft is right and never what is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paceline.engine.request import Request


class Reading(Protocol):
    """Maps a request to what its draft model reads."""

    def tokens(self, request: Request) -> Sequence[int]:
        """At least one token, the last one being the request's last committed token.

        While a request runs, what it returns only grows at its end.
        """
        ...


class WholeText:
    """All committed tokens."""

    def tokens(self, request: Request) -> Sequence[int]:
        """The request's own list."""
        return request.token_ids
