"""The draft stage: ask the planned drafters and make one tree per request.

A drafter that raises loses this step's proposals and is left out from then on; the requests go on without it.

Nodes that a request's grammar forbids are cut from proposals that were *chosen*, before anything is made of them, so
that what is left is expected as honestly as ever and nobody is blamed for them. A *sampled* draft is never cut by the
value of a token, nor united with others: its drafter draws under the grammar already.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from paceline.arrays import FloatArray
from paceline.cache.block_manager import BlockManager
from paceline.draft.base import NOTHING, DraftContext, Drafter, Proposal
from paceline.draft.tree import build, merge, part
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree, Origin
from paceline.engine.request import Request
from paceline.engine.types import DraftBatch, Observation, ScheduledBatch, SpecPlan

logger = logging.getLogger(__name__)


class Drafting:
    """Runs drafters by name.

    Args:
        drafters: in order of preference.
        merge_trees: unite the proposals of several drafters; otherwise the first that proposes anything is taken
            (which one that is must not depend on the noise of the draws to come).
        vocab_size: proposed tokens must be below it.
        room: most nodes of a request's tree, beside the plan's budget.
    """

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        *,
        merge_trees: bool,
        vocab_size: int,
        room: Callable[[Request], int] | None = None,
    ) -> None:
        self.drafters = dict(drafters)
        self.names = tuple(drafters)
        self._all = tuple(drafters.values())
        self._merge = merge_trees
        self._vocab_size = vocab_size
        self._room = room

    def draft(self, batch: ScheduledBatch, plan: SpecPlan) -> DraftBatch:
        """One tree per sampling request, inside the plan's budgets."""
        proposals: dict[str, list[Proposal]] = {}
        seconds: dict[str, float] = {}
        for name in plan.drafters:
            if name in self.drafters:
                started = time.perf_counter()
                proposals[name] = self._ask(self.drafters[name], batch, plan)
                seconds[name] = time.perf_counter() - started
        trees = []
        for i, item in enumerate(batch.sampling):
            filled = [(name, found[i]) for name, found in proposals.items() if found and len(found[i])]
            chances = {name: plan.acceptance[name][i] for name, _ in filled}
            trees.append(self._cut(self._tree(filled, chances), item.request) if filled else EMPTY_TREE)
        return DraftBatch(tuple(trees), seconds)

    def _ask(self, drafter: Drafter, batch: ScheduledBatch, plan: SpecPlan) -> list[Proposal]:
        budgets = np.minimum(plan.budgets, plan.limits[drafter.name]).tolist()
        name, acceptance = drafter.name, plan.acceptance[drafter.name] if drafter.cost_per_token else None
        depth = plan.depths.get(name)
        keep = None if name in plan.fixed else plan.keep_drafting
        contexts = [
            DraftContext(
                item.request,
                self._budget(item.request, name, budget),
                i,
                depth,
                None if acceptance is None else acceptance[i],
                keep,
            )
            for i, (item, budget) in enumerate(zip(batch.sampling, budgets, strict=True))
        ]
        try:
            proposals = list(drafter.propose(contexts))
            self._check(proposals, len(contexts))
            return [_allowed(p, c.request) for p, c in zip(proposals, contexts, strict=True)]
        except Exception:
            logger.exception("drafter %s failed and is left out from now on", drafter.name)
            del self.drafters[drafter.name]
            return []

    def _check(self, proposals: list[Proposal], expected: int) -> None:
        """Refuse what would break the whole batch's forward."""
        if len(proposals) != expected:
            raise ValueError(f"{len(proposals)} proposals for {expected} requests")
        for p in proposals:
            n = len(p)
            if not n == len(p.parents) == len(p.key) or (p.laws is not None and len(p.laws) != n):
                raise ValueError("a proposal's arrays have different lengths")
            if (p.laws is None) != (p.origin is Origin.CHOSEN):
                raise ValueError("a proposal's origin and its laws contradict each other")
            if n and (p.tokens.min() < 0 or p.tokens.max() >= self._vocab_size):
                raise ValueError("a proposed token is outside the vocabulary")
            if n and (p.parents.min() < -1 or (p.parents >= np.arange(n)).any()):
                raise ValueError("a node does not come after its parent")

    def _tree(self, proposals: list[tuple[str, Proposal]], acceptance: Mapping[str, FloatArray]) -> DraftTree:
        if self._merge and all(proposal.laws is None for _, proposal in proposals):
            return merge(proposals, acceptance)
        name, proposal = proposals[0]
        return build(name, proposal, acceptance[name])

    def _budget(self, request: Request, name: str, budget: int) -> int:
        """Most nodes this drafter may propose for the request, which may name the drafters it wants."""
        wish = request.params.speculation
        if wish is not None and wish.drafters is not None and name not in wish.drafters:
            return 0
        return budget if self._room is None else min(budget, self._room(request))

    def _cut(self, tree: DraftTree, request: Request) -> DraftTree:
        """What the request's own cap, and the room, leave of several drafters' nodes: the best. A sampled draft is
        within them already."""
        wish = request.params.speculation
        most = len(tree) if wish is None or wish.cap is None else wish.cap
        if self._room is not None:
            most = min(most, self._room(request))
        if tree.sampled or len(tree) <= most:
            return tree
        return tree.keep(np.sort(np.argsort(-tree.survival, kind="stable")[:most]))

    def observers(self, names: frozenset[str] | None) -> list[Drafter]:
        """The drafters of these names that want to see committed steps; None: all of them."""
        return [d for name, d in self.drafters.items() if names is None or name in names]

    def observe(self, observation: Observation, drafters: Sequence[Drafter]) -> None:
        """Show a committed step to drafters."""
        for drafter in drafters:
            if drafter.name not in self.drafters:
                continue
            try:
                drafter.observe(observation)
            except Exception:
                logger.exception("drafter %s failed to observe and is left out from now on", drafter.name)
                del self.drafters[drafter.name]

    def needs_last_tokens(self, names: Sequence[str]) -> bool:
        """Whether one of these drafters cannot draft before the step in flight was read: it wants to see the target's
        forward, or computes what it reads."""
        asked = [self.drafters[name] for name in names if name in self.drafters]
        return any(drafter.taps or drafter.cost_per_token for drafter in asked)

    def block_managers(self) -> list[BlockManager]:
        """The caches that drafters hold, for the engine's accounting."""
        return [d.blocks for d in self._all if d.blocks is not None]

    def forget(self, request: Request) -> None:
        """Drop a finished request's state."""
        for drafter in self._all:
            drafter.forget(request)


def _allowed(proposal: Proposal, request: Request) -> Proposal:
    """What the request's grammar leaves of a proposal. If the grammar fails, acceptance will say so."""
    if request.constraint is None or proposal.laws is not None or not len(proposal):
        return proposal
    try:
        return part(proposal, request.constraint.surviving(proposal.tokens, proposal.parents))
    except Exception:
        logger.exception("the grammar of request %s failed; it gets no draft", request.id)
        return NOTHING
