"""Parts of a context that drafts may read, in whole blocks (MagicDec 2408.11049).

- `SinkWindow`: the first tokens, to which attention falls when it has nowhere else to go, and the latest
  (StreamingLLM 2309.17453). Keys keep the positions with which they were stored.
- `QueryBlocks`: the blocks that the latest tokens attended to most (SnapKV 2404.14469; here by block, and for all heads
  and layers together, since one block table serves them all), the sinks, and the latest.
- `RandomBlocks`: the control: blocks chosen without looking, and the one that is being filled.

A view of fewer tokens than a context has is as good as nothing to the rest of the engine: it only changes guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.arrays import FloatArray
from paceline.engine.request import Request
from paceline.errors import SpeculationSpecError
from paceline.model.runner import ModelRunner, SequenceInput

SINKS = 16
"""Tokens at the start that are always read."""
_QUERIES = 32
"""Latest tokens whose attention chooses blocks."""


class SinkWindow:
    """The first `sinks` tokens and the latest, `budget` in all.

    Raises:
        SpeculationSpecError: the budget leaves no block beside the sinks.
    """

    def __init__(self, budget: int, block_size: int, sinks: int = SINKS) -> None:
        self._sinks = -(-sinks // block_size)
        self.recent = _beside_sinks(budget, block_size, sinks, 1)
        """Latest blocks that are read."""

    def chosen(self, request: Request, full: int) -> Sequence[int] | None:  # noqa: ARG002
        """The first and the last blocks."""
        if full <= self._sinks + self.recent:
            return None
        return [*range(self._sinks), *range(full - self.recent, full)]

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


class QueryBlocks:
    """Sinks, and half each of what the budget leaves: the blocks that the latest tokens attend to most, and the latest.

    They are chosen when the request first drafts, and again before a block that was not there then leaves the latest.

    Args:
        budget: tokens read.
        runner: the target, which is asked what it attends to.
        sinks: tokens at the start that are always read.

    Raises:
        SpeculationSpecError: the budget leaves no room.
    """

    def __init__(self, budget: int, runner: ModelRunner, sinks: int = SINKS) -> None:
        self._runner = runner
        size = runner.kv.block_size
        self._most = _beside_sinks(budget, size, sinks, 2) // 2
        self._rest = SinkWindow(budget - self._most * size, size, sinks)
        self._refresh = self._rest.recent
        self._best: dict[Request, tuple[int, FloatArray]] = {}  # by request: blocks then, and their weights

    def chosen(self, request: Request, full: int) -> Sequence[int] | None:
        """Sinks, the latest, and the best of the others."""
        always = self._rest.chosen(request, full)
        if always is None or full <= len(always) + self._most:
            return None
        at, weights = self._best.get(request, (0, None))
        if weights is None or not at <= full < at + self._refresh:
            weights = self._weights(request, full)
            self._best[request] = full, weights
        others = np.setdiff1d(np.arange(len(weights)), always)
        best = others[np.argsort(-weights[others], kind="stable")[: self._most]]
        return sorted([*always, *best.tolist()])

    def forget(self, request: Request) -> None:
        """Drop what was chosen."""
        self._best.pop(request, None)

    def _weights(self, request: Request, full: int) -> FloatArray:
        """How much the latest tokens attend to each full block.  # [full]"""
        computed = request.num_computed
        start = max(computed - _QUERIES, 0)
        tokens = request.token_ids[start:computed]
        latest = SequenceInput(tokens, np.arange(start, computed), start, request.blocks)
        return self._runner.attention_to_blocks(latest)[:full]


def least_budget(block_size: int, sinks: int) -> int:
    """The smallest budget that every way of choosing can do with."""
    return (-(-sinks // block_size) + 2) * block_size


def _beside_sinks(budget: int, block_size: int, sinks: int, least: int) -> int:
    """Blocks that a budget leaves beside the sinks, at least `least`."""
    if sinks < 0:
        raise SpeculationSpecError(f"sinks={sinks} is negative.", field="speculation", fix="Give 0 or more.")
    first = -(-sinks // block_size)
    found = budget // block_size - first
    if found < least:
        raise SpeculationSpecError(
            f"a budget of {budget} tokens leaves no room beside {sinks} at the start.",
            field="speculation",
            fix=f"Give budget={(first + least) * block_size} or more: it counts in blocks of {block_size}.",
        )
    return found


class RandomBlocks:
    """Any blocks, drawn anew for every draft.

    Args:
        budget: tokens read.
        block_size: tokens of a block.
        seed: of the draws.
    """

    def __init__(self, budget: int, block_size: int, seed: int = 0) -> None:
        self._count = _beside_sinks(budget, block_size, 0, 1)
        self._random = np.random.default_rng(seed)

    def chosen(self, request: Request, full: int) -> Sequence[int] | None:  # noqa: ARG002
        """As many as the budget holds."""
        if full <= self._count:
            return None
        found: list[int] = np.sort(self._random.choice(full, self._count, replace=False)).tolist()
        return found

    def forget(self, request: Request) -> None:
        """Nothing is kept."""
