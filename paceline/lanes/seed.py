"""SEED (2406.18200): several thoughts of one tree state are drafted side by side, and one target verifies them.

Each thought has a draft lane of its own. Drafted tokens join the target's queue, which is served first come, first
served; while one thought is verified the others draft:

    draft 1   [d][ ][d][ ]...        a thought waits for the target at most as long as the others' forwards take
    draft 2   [d]   [ ][d]...
    target       [1][2][1][2]...     never idle where drafting takes no longer than the others' forwards

Every thought has its own draft, KV and noise, so each is what it would be alone, whoever comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.lanes.clock import Clock
from paceline.lanes.plain import TARGET, speculation
from paceline.lanes.tokens import Text
from paceline.lanes.work import Process


def lane_of(number: int) -> str:
    """The lane that drafts for a thought."""
    return f"draft {number}"


def seed(clock: Clock, texts: Sequence[Text], length: int) -> None:
    """Put all thoughts to work. A thought whose draft lane dies goes on without drafts.

    Args:
        clock: with a lane `target` and one `lane_of(i)` for each text.
        texts: the thoughts.
        length: draft tokens a round.
    """
    for number, text in enumerate(texts):
        clock.spawn(thought(clock, text, length, number))


def thought(clock: Clock, text: Text, length: int, number: int) -> Process:
    """One thought: draft, queue for the target, again."""
    return speculation(clock, text, length, draft=lane_of(number), stages=(TARGET,))
