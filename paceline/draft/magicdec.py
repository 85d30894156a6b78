"""MagicDec (2408.11049): the target drafts for itself and reads a small part of its own KV cache.

At long contexts, and in large batches, reading keys and values takes most of a forward, so one over a few hundred
tokens of the context costs a fraction of the target's, and there is no second model to hold. Verification reads all.

Options: `budget` (tokens read; without it the best of a few is chosen from measured acceptance and times, for each
size of context), `select` (`recent`: sinks and latest, what is used if nothing is said; `query`: what the latest tokens
attend to, dearer to choose; `random`: a control) and `sinks`.

The published code drafts greedily and keeps a draft cache; here any acceptance rule, tree shape and temperature works,
and there is no draft cache: drafts read the target's own blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from paceline.draft.base import DraftContext, Proposal
from paceline.draft.kv_budget import Budgets
from paceline.draft.kv_views import SINKS, QueryBlocks, RandomBlocks, SinkWindow, least_budget
from paceline.draft.self_drafter import SelfDrafter
from paceline.draft.self_model import KvView, Target
from paceline.draft.tenants import Tenants
from paceline.engine.request import Request
from paceline.engine.types import Observation
from paceline.errors import SpeculationSpecError

_BUDGETS = (256, 512, 1024)
_SELECTS = ("recent", "query", "random")
_LEAST = 4
"""A budget is worth trying where the context is so many times as long."""
_SECONDS_RATE = 0.1
_MAX_TENANTS = 64
_LONGEST = 8
"""Draft length up to which budgets are compared."""


class MagicDecDrafter(SelfDrafter):
    """The drafter.

    Args:
        target: the model.
        budget: tokens read; None: chosen.
        select: which ones; None: `recent`.
        sinks: tokens at the start that are always read.
        options: see `SelfDrafter`.

    Raises:
        SpeculationSpecError: an unknown `select`, a budget without room, or a model with sliding windows.
    """

    name = "magicdec"

    def __init__(
        self,
        target: Target,
        *,
        budget: int | None = None,
        select: str | None = None,
        sinks: int = SINKS,
        **options: Any,
    ) -> None:
        if target.has_windows:
            raise SpeculationSpecError(
                "magicdec needs a model that attends to its whole context; this one has sliding windows.",
                field="speculation",
                fix="Choose another drafter for it.",
            )
        self._target = target
        chosen = select or "recent"
        least = least_budget(target.blocks.block_size, max(sinks, 0))
        budgets = tuple(sorted({max(b, least) for b in _BUDGETS})) if budget is None else (budget,)
        self._views = {f"{chosen} {b}": (_view(chosen, b, sinks, target), b) for b in budgets}
        super().__init__(
            target,
            view=next(iter(self._views.values()))[0],
            **options,
        )
        self.least_tokens = 0 if budget is not None else _LEAST * min(budgets)
        self._tenants: Tenants[dict[int, Budgets]] = Tenants(dict, _MAX_TENANTS)  # by logarithm of the mean context
        self._target_seconds: float | None = None
        self._rounds: dict[Request, tuple[Budgets, int, tuple[int, ...]]] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """Drafts of all requests over the same kind of view."""
        drafting = [c.request for c in contexts if c.budget > 0]
        if not drafting:
            return super().propose(contexts)
        runner = self._target.runner
        self._learn_target_seconds(runner.last_seconds)
        size = (sum(len(r.token_ids) for r in drafting) // len(drafting)).bit_length() - 1
        known = self._known(drafting[0], size)
        number = self._choose(known, size)
        self.model.view = list(self._views.values())[number][0]
        started, forwards, looks = time.perf_counter(), runner.num_forwards, runner.num_looks
        proposals = super().propose(contexts)
        forwards = runner.num_forwards - forwards
        if forwards and looks == runner.num_looks:
            known.choices[number].learn_seconds((time.perf_counter() - started) / forwards)
        for context, proposal in zip(contexts, proposals, strict=True):
            if len(proposal):
                self._rounds[context.request] = self._known(context.request, size), number, _first_path(proposal)
        return proposals

    def observe(self, observation: Observation) -> None:
        """Count what the view brought."""
        found = self._rounds.pop(observation.request, None)
        if found is None:
            return
        known, number, path = found
        tested = min(len(path), len(observation.committed))
        hits = 0
        while hits < tested and path[hits] == observation.committed[hits]:
            hits += 1
        known.choices[number].learn_outcome(hits, min(hits + 1, tested))

    def forget(self, request: Request) -> None:
        """Drop what the views know of it."""
        self._rounds.pop(request, None)
        self._tenants.forget(request)
        for view, _ in self._views.values():
            view.forget(request)

    def report(self, request: Request) -> dict[str, dict[str, float]]:
        """What a request's tenant has taught of every view: acceptance, and seconds of a draft forward, by size of
        context."""
        known = self._tenants.of(request)
        self._tenants.forget(request)
        return {
            f"{choice.name} at {1 << size}": {"acceptance": choice.acceptance, "seconds": choice.seconds or 0.0}
            for size, budgets in sorted(known.items())
            for choice in budgets.choices
            if choice.tested
        }

    def _known(self, request: Request, size: int) -> Budgets:
        """What its tenant has taught about contexts of this size; at first, what it has about the nearest one."""
        known = self._tenants.of(request)
        if size not in known:
            nearest = min(known, key=lambda other: abs(other - size), default=None)
            known[size] = Budgets(tuple(self._views), None if nearest is None else known[nearest])
        return known[size]

    def _choose(self, known: Budgets, size: int) -> int:
        context = 1 << size
        usable = [i for i, (_, budget) in enumerate(self._views.values()) if context >= _LEAST * budget]
        return known.choose(usable or [0], self._target_seconds or 0.0, _LONGEST)

    def _learn_target_seconds(self, seconds: float) -> None:
        """Of the last forward, which is the target's unless another drafter took one; a prompt's is cut back."""
        before = self._target_seconds or seconds
        self._target_seconds = before + _SECONDS_RATE * (min(seconds, 4.0 * before) - before)


def _view(select: str, budget: int, sinks: int, target: Target) -> KvView:
    size = target.blocks.block_size
    if select == "recent":
        return SinkWindow(budget, size, sinks)
    if select == "query":
        return QueryBlocks(budget, target.runner, sinks)
    if select == "random":
        return RandomBlocks(budget, size)
    raise SpeculationSpecError(
        f"magicdec:select={select!r} is not known.", field="speculation", fix=f"It is one of {', '.join(_SELECTS)}."
    )


def _first_path(proposal: Proposal) -> tuple[int, ...]:
    """Tokens from the root down along first children."""
    path, at = [], -1
    for node, (token, parent) in enumerate(zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True)):
        if parent == at:
            path.append(token)
            at = node
    return tuple(path)
