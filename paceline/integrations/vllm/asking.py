"""What scheduler and drafter tell one another where they live in one process.

vLLM gives a `custom_class` drafter no length, and no request ids. With one worker in the engine's process (no tensor or
pipeline parallelism) this value reaches it all the same; elsewhere it is never set, and the drafter drafts in every
step, up to the length that the server was started with.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Board:
    """The newest word of both sides."""

    drafter: bool = False
    """Whether a drafter of ours lives in this process."""
    length: int | None = None
    """Most tokens to draft for a request; None: as many as the server was started with."""
    seconds: float = 0.0
    """Time of the last draft."""


BOARD = Board()
