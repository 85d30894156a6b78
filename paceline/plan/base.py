"""The length policy protocol: how far to look ahead. Policies read statistics and emit plans; drafters never decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paceline.config import RequestSpeculation
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats

PLAIN = SpecPlan(budgets=(), drafters=(), bucket=0, acceptance={})
"""Look ahead by zero."""


@dataclass(frozen=True, slots=True)
class DrafterLimits:
    """What a policy must know of a drafter: its cap, and whether each token costs a forward of its own."""

    name: str
    most: int
    cost_per_token: bool


class LengthPolicy(Protocol):
    """Decides every step, from what was measured so far."""

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """The plan of the next step."""
        ...

    def learn(self, stats: StepStats) -> None:
        """Take in a step's statistics."""
        ...


def room(batch: ScheduledBatch, max_model_len: int, cap: int) -> tuple[int, ...]:
    """Most nodes per sampling request: at most `cap` and what the request itself allows, and no path longer than
    `max_tokens` and the context leave."""
    return tuple(
        max(
            0,
            min(
                allowed(item.request.params.speculation, cap),
                item.request.params.max_tokens - item.request.num_output - 1,
                max_model_len - len(item.request.token_ids) - 1,
            ),
        )
        for item in batch.sampling
    )


def allowed(wish: RequestSpeculation | None, cap: int) -> int:
    """`cap`, or less where the request asks for less."""
    if wish is None:
        return cap
    return 0 if wish.off else cap if wish.cap is None else min(cap, wish.cap)
