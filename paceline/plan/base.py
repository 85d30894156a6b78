"""The length policy protocol: how far to look ahead. Policies read statistics and emit plans; drafters never decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paceline.arrays import IntArray
from paceline.engine.request import Request
from paceline.engine.types import ScheduledBatch, SpecPlan, StepStats
from paceline.plan.requests import RequestTable

PLAIN = SpecPlan(budgets=np.empty(0, dtype=np.int64), drafters=(), bucket=0, acceptance={})
"""Look ahead by zero."""


@dataclass(frozen=True, slots=True)
class DrafterLimits:
    """What a policy must know of a drafter: its cap, and whether it takes forwards of its own, one for each level
    of its trees, which have `width` nodes on average.

    `fixed` says that its nodes, up to `most` per request, are drafted and verified whatever the policy thinks.
    `by_rank` says that its confidence classes are sibling ranks, and its trees the best ones for what is measured of
    them (`engine.positional`).
    """

    name: str
    most: int
    cost_per_token: bool
    fixed: bool = False
    width: float = 1.0
    by_rank: bool = False
    hidden_size: int | None = None
    """Of a draft model's hidden states, which a policy's head must fit."""
    least_tokens: int = 0
    """Mean length of the requests from which on it has anything to offer."""


class LengthPolicy(Protocol):
    """Decides every step, from what was measured so far."""

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """The plan of the next step."""
        ...

    def learn(self, stats: StepStats) -> None:
        """Take in a step's statistics."""
        ...

    def forget(self, request: Request) -> None:
        """Drop the state of a finished request."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """The requests that commit tokens in a step, as arrays."""

    requests: tuple[Request, ...]
    rows: IntArray  # [num_sampling], in the request table
    num_tokens: int
    """Committed tokens of all of them."""
    room: IntArray  # [num_sampling], most draft nodes

    def __len__(self) -> int:
        return len(self.requests)


def sampling(batch: ScheduledBatch, table: RequestTable, max_model_len: int, cap: int) -> Sampling:
    """Read a batch. A request gets at most `cap` draft nodes, no more than it allows itself, and no path longer than
    its `max_tokens` and the context leave."""
    requests = tuple([item.request for item in batch.items if item.samples])
    known = table.batch(requests, max_model_len)
    lengths = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
    room = np.minimum(np.maximum(known.longest - lengths, 0), np.minimum(known.caps, cap))
    return Sampling(requests, known.rows, int(lengths.sum()), room)
