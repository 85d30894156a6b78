"""The drafter protocol: anything that proposes tokens.

A drafter sees committed tokens only and never decides how long to look ahead; the plan does. What it offers beside
tokens is a *confidence class* per node (a small integer, `key`); how often nodes of that class are accepted is
measured outside, so a drafter cannot be overconfident for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.cache.block_manager import BlockManager
from paceline.engine.draft_progress import KeepDrafting
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request
from paceline.engine.sampling import Law
from paceline.engine.types import Observation, Tap


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What one request asks of a drafter: at most `budget` nodes after its committed tokens.

    The rest is for drafters that take forwards of their own: at most `depth` of them (None: as many as the budget),
    `acceptance` for the plan's estimates by confidence class, and `keep_drafting`, asked after each forward with the
    request's number `row` in the step (the same object in all contexts of a step).
    """

    request: Request
    budget: int
    row: int = 0
    depth: int | None = None
    acceptance: FloatArray | None = None  # [num_keys]
    keep_drafting: KeepDrafting | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A draft tree as its drafter made it (the conventions of `engine.types`).

    Tokens that were drawn say so by `origin`, and carry one draft law per node in `laws`.
    """

    tokens: IntArray  # [n]
    parents: IntArray  # [n]
    key: IntArray  # [n]
    laws: tuple[Law, ...] | None = None
    origin: Origin = Origin.CHOSEN

    def __len__(self) -> int:
        return len(self.tokens)


_NO_NODES = np.empty(0, dtype=np.int64)
NOTHING = Proposal(_NO_NODES, _NO_NODES, _NO_NODES)


def chain(tokens: Sequence[int], key: Sequence[int], laws: tuple[Law, ...] | None = None) -> Proposal:
    """A proposal without branches; with `laws`, its tokens were drawn from them."""
    origin = Origin.CHOSEN if laws is None else Origin.DISTINCT
    parents = np.arange(-1, len(tokens) - 1)
    return Proposal(np.asarray(tokens, dtype=np.int64), parents, np.asarray(key, dtype=np.int64), laws, origin)


class Drafter(Protocol):
    """One drafting method. All state it keeps per request is dropped by `forget`."""

    name: str
    taps: frozenset[Tap]
    """What it wants to observe."""
    prior: FloatArray
    """First guess of the acceptance probability of each confidence class.  # [num_keys]"""
    cost_per_token: bool
    """Whether drafting takes forwards of its own (a draft model), so that its length must be planned."""

    @property
    def blocks(self) -> BlockManager | None:
        """Who accounts for its own KV cache, if it has one."""
        ...

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """One proposal per context; `NOTHING` where it has no guess."""
        ...

    def observe(self, observation: Observation) -> None:
        """Learn from a committed step."""
        ...

    def forget(self, request: Request) -> None:
        """Drop the request's state."""
        ...
