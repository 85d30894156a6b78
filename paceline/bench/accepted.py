"""How many tokens a target forward brings with each drafter, on recorded greedy outputs and with unlimited time.

Requests are replayed one after another in the order of the file. Drafting, merging, trimming and the online estimates
are the engine's own; only the target is replaced: under greedy decoding a draft is accepted exactly as far as it agrees
with the recorded output. Every drafter may propose as many nodes as its default cap or the budget, whichever is more,
and the budget's best are verified. State is kept from request to request as in a server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.bench.replay import recorded_walk
from paceline.bench.replay_traces import Recorded
from paceline.config import SamplingParams
from paceline.draft import registry
from paceline.draft.base import DraftContext, Drafter, Proposal
from paceline.draft.drafting import Drafting
from paceline.draft.recycling import WIDTH
from paceline.engine.feedback import node_labels
from paceline.engine.request import Request
from paceline.engine.types import (
    DraftBatch,
    Observation,
    ScheduledBatch,
    ScheduledRequest,
    SpecPlan,
    StepStats,
    Tap,
    Walk,
)
from paceline.errors import InputError
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.trim import trim

CONTROLS = {
    "zero": "all state is dropped after every request",
    "shuffle": "every recorded output is put in a random order first",
    "random": "every drafted token is replaced by a random one",
}
_SUPPLIED = frozenset({"vocab_size", "chain"})
_TAPS = frozenset({Tap.TOP_IDS})
_NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class AcceptSetting:
    """One run."""

    drafters: tuple[str, ...]
    """More than one: their trees are merged."""
    nodes: int
    """Most draft nodes of a step."""
    warmup: int = 0
    """The first requests, which are replayed but not counted."""
    control: str | None = None
    seed: int = 0
    """Of the controls."""


@dataclass(slots=True)
class Accepted:
    """What a run counted."""

    tokens: int = 0
    steps: int = 0
    nodes: int = 0
    expected: float = 0.0
    """Accepted tokens that the estimates expected."""
    draft_seconds: float = 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per target forward, the target's own included."""
        return self.tokens / self.steps if self.steps else 0.0


def check_reader(name: str) -> None:
    """Refuse a drafter that needs more than tokens.

    Raises:
        InputError: it does.
    """
    if not set(registry.entry(name).needs) <= _SUPPLIED:
        readers = ", ".join(n for n, entry in sorted(registry.DRAFTERS.items()) if set(entry.needs) <= _SUPPLIED)
        raise InputError(
            f"{name} reads more than tokens and cannot be run on a trace.", field="--drafter", fix=f"Take {readers}."
        )


def check_warmup(warmup: int, requests: int) -> None:
    """Refuse a warm-up that leaves nothing to count.

    Raises:
        InputError: it does.
    """
    if warmup >= requests:
        raise InputError(
            f"is {warmup}, but there are only {requests} requests.", field="--warmup", fix="Leave some to be counted."
        )


class Successors:
    """The latest different tokens that were seen to follow each token: what a trace can say instead of logits."""

    def __init__(self) -> None:
        self._after: dict[int, list[int]] = {}

    def rows(self, tokens: Sequence[int]) -> tuple[IntArray, IntArray]:
        """Read a stretch of output: its tokens but the last, and what follows each, the latest first; -1 is unknown.

        Returns:
            Tokens [n] and successors [n, WIDTH].
        """
        table = np.full((len(tokens) - 1, WIDTH), -1, dtype=np.int64)
        for i, (token, following) in enumerate(pairwise(tokens)):
            known = self._after.setdefault(token, [])
            if following in known:
                known.remove(following)
            known.insert(0, following)
            del known[WIDTH:]
            table[i, : len(known)] = known
        return np.array(tokens[:-1], dtype=np.int64), table


class _Random:
    """A drafter whose tokens are replaced by random ones."""

    def __init__(self, drafter: Drafter, vocab_size: int, rng: np.random.Generator) -> None:
        self.name, self.taps, self.prior = drafter.name, drafter.taps, drafter.prior
        self.cost_per_token, self.blocks = drafter.cost_per_token, drafter.blocks
        self.observe, self.forget = drafter.observe, drafter.forget
        self._drafter, self._vocab_size, self._rng = drafter, vocab_size, rng

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """As many nodes in the same places."""
        made = self._drafter.propose(contexts)
        return [replace(p, tokens=self._rng.integers(self._vocab_size, size=len(p))) for p in made]


class _Stages:
    """Drafters, draft stage and estimates with the state of the requests so far."""

    def __init__(self, setting: AcceptSetting, vocab_size: int, rng: np.random.Generator) -> None:
        made: dict[str, Drafter] = {}
        for name in setting.drafters:
            drafter = registry.create(name, {}, {"vocab_size": vocab_size, "chain": False})
            made[name] = _Random(drafter, vocab_size, rng) if setting.control == "random" else drafter
        self.drafting = Drafting(made, merge_trees=True, vocab_size=vocab_size)
        self.estimates = AcceptanceEstimates({name: drafter.prior for name, drafter in made.items()})
        self.observers = [drafter for drafter in made.values() if drafter.taps & _TAPS]
        self.successors = Successors()

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self.drafting.forget(request)
        self.estimates.forget(request)


def replay_accepted(trace: Sequence[Recorded], setting: AcceptSetting) -> Iterator[Accepted]:
    """Replay a trace; the counts so far after every request.

    Raises:
        InputError: a drafter failed, or the warm-up leaves nothing to count.
    """
    check_warmup(setting.warmup, len(trace))
    rng = np.random.default_rng(setting.seed)
    vocab_size = 1 + max(max(*item.prompt, *item.output) for item in trace)
    stages = _Stages(setting, vocab_size, rng)
    total = Accepted()
    for number, item in enumerate(trace):
        if setting.control == "zero":
            stages = _Stages(setting, vocab_size, rng)
        output = item.output
        if setting.control == "shuffle":
            output = tuple(output[i] for i in rng.permutation(len(output)))
        found = _replay_one(replace(item, output=output), stages, setting)
        if number >= setting.warmup:
            _add(total, found)
        yield total


def _replay_one(item: Recorded, stages: _Stages, setting: AcceptSetting) -> Accepted:
    params = SamplingParams(temperature=0.0, max_tokens=len(item.output))
    request = Request(item.id, list(item.prompt), len(item.prompt), params, seed=0)
    request.num_computed = len(request.token_ids) - 1
    found = Accepted()
    while request.num_output < len(item.output):
        batch = ScheduledBatch((ScheduledRequest(request, request.num_computed, 1, True),))
        plan = _plan(request, stages, setting)
        drafted = stages.drafting.draft(batch, plan)
        if len(stages.drafting.drafters) < len(setting.drafters):
            raise InputError("a drafter failed; the log says why.", field="--drafter")
        verified = trim(drafted, plan)
        walk = recorded_walk(verified.trees[0], item.output[request.num_output :])
        _count(found, drafted, verified, walk)
        stages.estimates.learn(_stats(request, drafted, walk, plan.acceptance))
        if stages.observers:
            rows = stages.successors.rows([request.token_ids[-1], *walk.tokens])
            for drafter in stages.observers:
                drafter.observe(Observation(request, walk.tokens, *rows))
        request.token_ids.extend(walk.tokens)
        request.num_computed = len(request.token_ids) - 1
    stages.forget(request)
    return found


def _plan(request: Request, stages: _Stages, setting: AcceptSetting) -> SpecPlan:
    """Every drafter is asked; the budget's best nodes are verified."""
    rows = stages.estimates.requests.batch((request,), _NO_LIMIT).rows
    limits: dict[str, Any] = {name: max(registry.entry(name).most, setting.nodes) for name in setting.drafters}
    return SpecPlan(
        budgets=np.array([max(limits.values())]),
        drafters=setting.drafters,
        bucket=setting.nodes,
        acceptance=stages.estimates.of_batch((request,), rows, setting.drafters),
        limits=limits,
    )


def _stats(request: Request, drafted: DraftBatch, walk: Walk, acceptance: Mapping[str, FloatArray]) -> StepStats:
    """What the estimates learn from: the labels. Nothing else is measured here."""
    return StepStats(
        requests=(request,),
        num_prompt_tokens=0,
        num_context_tokens=len(request.token_ids),
        num_sequences=1,
        committed=np.array([len(walk.tokens)]),
        verified=np.array([0]),
        forward_seconds=0.0,
        step_seconds=0.0,
        draft_seconds={},
        draft_depths={},
        gains={},
        nodes={},
        labels=node_labels([(0, drafted.drafted[0], walk.tokens)], acceptance),
    )


def _count(found: Accepted, drafted: DraftBatch, verified: DraftBatch, walk: Walk) -> None:
    found.tokens += len(walk.tokens)
    found.steps += 1
    found.nodes += verified.num_nodes
    found.expected += float(verified.trees[0].survival.sum())
    found.draft_seconds += sum(drafted.seconds.values())


def _add(total: Accepted, found: Accepted) -> None:
    total.tokens += found.tokens
    total.steps += found.steps
    total.nodes += found.nodes
    total.expected += found.expected
    total.draft_seconds += found.draft_seconds
