"""A simulated engine for length policies: real plan, drafting, trim and feedback; odds and a clock of our own.

Every request has a future: the tokens it will commit. A simulated drafter knows it and, node by node, proposes the
right token with the odds that the test states, or a wrong one. So whether a node is accepted is exactly as random as
the test says, and a step takes exactly as long as the test says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fakes
import numpy as np
import torch
from engine_tools import greedy, make_request

from paceline import RequestSpeculation
from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.draft.drafting import Drafting
from paceline.engine.draft_progress import DraftProgress
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree
from paceline.engine.feedback import step_stats
from paceline.engine.request import Request
from paceline.engine.types import (
    Acceptance,
    AcceptedStep,
    DraftBatch,
    Observation,
    ScheduledBatch,
    ScheduledRequest,
    SpecPlan,
    StepStats,
    Tap,
    TargetScores,
    Walk,
)
from paceline.plan.base import DrafterLimits, LengthPolicy
from paceline.plan.cost_model import CostModel, CostTable, DraftCost
from paceline.plan.registry import create_policy
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.trim import trim

RIGHT_IDS = 1000
"""Tokens that are committed lie below it, wrong guesses above."""
_NO_SCORES = TargetScores(torch.empty(0, 1), ())

Seconds = Callable[[float], float]


def flat_then_linear(tokens: float) -> float:
    """Seconds of a forward on a small machine: a tenth of a step for every token."""
    return 0.010 + 0.001 * tokens


def steep(tokens: float) -> float:
    """Seconds of a forward where every token costs nearly as much as the first."""
    return 0.001 + 0.009 * tokens


def cheap(tokens: float) -> float:
    """Seconds of a forward on a machine that has room: 64 tokens take 6% more than one."""
    return 0.010 + 0.00001 * tokens


def cost_of(seconds: Seconds, draft: Mapping[str, DraftCost] | None = None, *, adapt: bool = True) -> CostModel:
    """The cost model of a machine."""
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
    return CostModel(CostTable(sizes, tuple(seconds(n) for n in sizes), draft=draft or {}), adapt=adapt)


@dataclass
class SimDrafter:
    """Proposes chains whose nodes are right with the stated odds.

    `key(rng, step, depth)` is the class a node claims and `odds(step, key, request)` the chance that it is right. If it
    takes forwards of its own it asks the plan after each one who goes on.
    """

    name: str = "ngram"
    odds: Callable[[int, int, Request], float] = lambda _step, _key, _request: 0.5
    key: Callable[[np.random.Generator, int, int], int] = lambda _rng, _step, _depth: 0
    claims: Callable[[int], int] = lambda key: key
    prior: np.ndarray = field(default_factory=lambda: np.array([0.5]))
    most: int = 16
    fixed: bool = False
    cost_per_token: bool = False
    seconds: float = 0.0
    """Time to be asked, per request; for a draft model per depth."""
    taps: frozenset[Tap] = frozenset()
    blocks: Any = None
    world: World | None = None
    budgets: list[int] = field(default_factory=list)
    """What it was asked for in the last step it was asked."""
    levels: int = 0
    """Forwards it took in that step."""
    shown: int = 0
    """Observations it was shown."""

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """One chain per request."""
        assert self.world is not None
        self.budgets = [context.budget for context in contexts]
        keys: list[list[int]] = [[] for _ in contexts]
        active = [i for i, budget in enumerate(self.budgets) if budget]
        keep, self.levels = contexts[0].keep_drafting if contexts else None, 0
        while active:
            for i in active:
                keys[i].append(self.key(self.world.rng, self.world.step_number, self.levels))
            self.levels += 1
            active = [i for i in active if len(keys[i]) < self.budgets[i]]
            if keep is not None and active:
                going = keep.keep(self._progress(contexts, keys, active)).tolist()
                active = [i for i, goes in zip(active, going, strict=True) if goes]
        return [self._propose(context, own) for context, own in zip(contexts, keys, strict=True)]

    def _progress(self, contexts: Sequence[DraftContext], keys: list[list[int]], active: list[int]) -> DraftProgress:
        """What a real draft model would say of itself: entropy and confidence as the classes' true odds have it."""
        assert self.world is not None
        step = self.world.step_number
        tables = [contexts[i].acceptance for i in active]
        assert all(table is not None for table in tables)
        survival = [np.prod([t[self.claims(k)] for k in keys[i]]) for i, t in zip(active, tables, strict=True)]
        odds = np.array([self.odds(step, keys[i][-1], contexts[i].request) for i in active])
        return DraftProgress(
            depth=self.levels,
            rows=np.array([contexts[i].row for i in active]),
            nodes=np.array([len(keys[i]) for i in active]),
            survival=np.array(survival),
            chain_survival=np.array(survival),
            entropy=-2.0 * np.log(np.maximum(odds, 1e-9)),
            confidence=odds,
            hidden=torch.from_numpy(np.repeat(odds[:, None], 64, axis=1)),
            top_probabilities=np.pad(odds[:, None], ((0, 0), (0, 9))),
        )

    def _propose(self, context: DraftContext, keys: list[int]) -> Proposal:
        assert self.world is not None
        if not keys:
            return NOTHING
        rng, step = self.world.rng, self.world.step_number
        right = [rng.random() < self.odds(step, key, context.request) for key in keys]
        future = self.world.future(context.request, len(keys))
        wrong = RIGHT_IDS + self.world.names.index(self.name)
        return chain([t if ok else wrong for t, ok in zip(future, right, strict=True)], [self.claims(k) for k in keys])

    def observe(self, observation: Observation) -> None:
        """Count it."""
        self.shown += bool(observation.committed)

    def forget(self, request: Request) -> None:
        """There is no state."""


@dataclass(frozen=True)
class Step:
    """What happened."""

    plan: SpecPlan
    drafted: DraftBatch
    kept: DraftBatch
    stats: StepStats

    @property
    def verified(self) -> list[int]:
        """Nodes verified by request."""
        return [len(t) for t in self.kept.trees]

    @property
    def nodes(self) -> int:
        """Nodes verified."""
        return self.kept.num_nodes


class World:
    """Requests that decode for ever under a policy."""

    def __init__(
        self,
        drafters: Sequence[SimDrafter],
        *,
        policy: str = "auto",
        seconds: Seconds = flat_then_linear,
        requests: int | Sequence[Request] = 1,
        prompt_tokens: Callable[[int], int] = lambda _step: 0,
        cost: CostModel | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.drafters = tuple(drafters)
        self.names = tuple(d.name for d in drafters)
        for drafter in drafters:
            drafter.world = self
        self.rng = np.random.default_rng(seed)
        self.requests = [decoder() for _ in range(requests)] if isinstance(requests, int) else list(requests)
        self.seconds = seconds
        self.step_number = 0
        self.clock = 0.0
        costly = [d.name for d in drafters if d.cost_per_token]
        self.estimates = AcceptanceEstimates({d.name: d.prior for d in drafters}, by_depth=costly)
        limits = [DrafterLimits(d.name, d.most, d.cost_per_token, d.fixed) for d in drafters]
        models = {d.name: DraftCost(per_depth=d.seconds) for d in drafters if d.cost_per_token}
        self.cost = cost or cost_of(seconds, models)
        options = {**fakes.head_options(policy), **options}
        self.policy: LengthPolicy = create_policy(policy, options, limits, self.estimates, lambda: self.cost)
        self.drafting = Drafting(
            {d.name: d for d in drafters}, merge_trees=True, vocab_size=RIGHT_IDS + len(self.drafters)
        )
        self._prompt_tokens = prompt_tokens
        self._futures: dict[Request, list[int]] = {}

    def future(self, request: Request, count: int) -> list[int]:
        """The next tokens that the request will commit."""
        known = self._futures.setdefault(request, [])
        known += self.rng.integers(0, RIGHT_IDS, max(0, count - len(known))).tolist()
        return known[:count]

    def step(self) -> Step:
        """One step of everybody."""
        batch = batch_in_decode(self.requests, self._prompt_tokens(self.step_number))
        plan = self.policy.plan(batch, 1 << 30)
        drafted = kept = DraftBatch((EMPTY_TREE,) * len(self.requests))
        if plan.looks_ahead:
            drafted = self.drafting.draft(batch, plan)
            spent = {name: self._draft_seconds(name) for name in drafted.seconds}
            drafted = dataclasses.replace(drafted, seconds=spent)
            kept = trim(drafted, plan)
        walks = [self._walk(r, t) for r, t in zip(self.requests, kept.trees, strict=True)]
        took = self.seconds(batch.num_tokens + kept.num_nodes) + sum(drafted.seconds.values())
        shown = self.drafting.observers(plan.observers)
        acceptance = Acceptance(tuple(walks))
        flight = AcceptedStep(batch, plan, drafted, kept, _NO_SCORES, 0.0, acceptance=acceptance, forward_seconds=took)
        for item, walk in zip(batch.sampling, walks, strict=True):
            self.drafting.observe(Observation(item.request, walk.tokens, np.empty(0, dtype=np.int64)), shown)
        stats = step_stats(flight, took, {})
        for request, walk in zip(self.requests, walks, strict=True):
            request.token_ids += walk.tokens
            del self._futures[request][: len(walk.tokens)]
        self.policy.learn(stats)
        self.step_number += 1
        self.clock += took
        return Step(plan, drafted, kept, stats)

    def run(self, steps: int) -> list[Step]:
        """Many steps."""
        return [self.step() for _ in range(steps)]

    def _draft_seconds(self, name: str) -> float:
        drafter = self.drafters[self.names.index(name)]
        return drafter.seconds * (drafter.levels if drafter.cost_per_token else len(self.requests))

    def _walk(self, request: Request, tree: DraftTree) -> Walk:
        future = self.future(request, len(tree) + 1)
        children = tree.children()
        path: list[int] = []
        while True:
            at = path[-1] if path else -1
            token = future[len(path)]
            found = [kid for kid in children[at + 1] if tree.tokens[kid] == token]
            if not found:
                return Walk(tuple(path), tuple(future[: len(path) + 1]))
            path.append(found[0])


def decoder(max_tokens: int = 1 << 20, *, salt: str = "", **wish: Any) -> Request:
    """A request that has its prompt behind it."""
    params = greedy(max_tokens, speculation=RequestSpeculation(**wish) if wish else None)
    return make_request(range(3, 13), params, salt=salt)


def batch_in_decode(requests: Sequence[Request], prompt_tokens: int = 0) -> ScheduledBatch:
    """Every request's root, and the prompt chunk of somebody else."""
    items = [ScheduledRequest(r, len(r.token_ids) - 1, 1, True) for r in requests]
    if prompt_tokens:
        items.append(ScheduledRequest(make_request(range(3, 5)), 0, prompt_tokens, False))
    return ScheduledBatch(tuple(items))


def limits_of(plan: SpecPlan, name: str) -> list[int]:
    """Most nodes that a drafter is asked for, by request; 0 where it is not asked."""
    return np.broadcast_to(plan.limits.get(name, 0), len(plan.budgets)).tolist()  # type: ignore[no-any-return]


def goodput(steps: Sequence[Step]) -> float:
    """Tokens per second."""
    return sum(s.stats.num_committed for s in steps) / sum(s.stats.step_seconds for s in steps)


def mean_nodes(steps: Sequence[Step]) -> float:
    """Verified nodes per step."""
    return float(np.mean([s.nodes for s in steps]))
