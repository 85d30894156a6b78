"""Length policies on an event clock: recorded tokens, modelled time.

The policies, the draft and trim stages and the statistics are the engine's own; only the target is replaced. What it
says comes from a trace (`replay_traces`), what a step takes from a cost table. A run keeps `batch` requests going, or
takes arrivals from a list of times. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from paceline.bench.replay_oracle import OracleEstimates
from paceline.bench.replay_queue import ReplayQueue
from paceline.bench.replay_traces import RECORDED, WRONG, Recorded, Script, ScriptedDrafter, right_nodes, trace_id
from paceline.draft.drafting import Drafting
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree
from paceline.engine.feedback import step_stats
from paceline.engine.request import FinishReason, Request
from paceline.engine.types import Acceptance, AcceptedStep, DraftBatch, ScheduledBatch, SpecPlan, TargetScores, Walk
from paceline.errors import InputError, SpeculationSpecError
from paceline.plan.base import PLAIN, DrafterLimits, LengthPolicy
from paceline.plan.cost_model import CostModel, CostTable
from paceline.plan.registry import check_policy, create_policy
from paceline.plan.spec import parse_speculation
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.trim import trim

ORACLE = "oracle"
NONE = "none"
_NO_SCORES = TargetScores(torch.empty(0, 1), ())
_LONGEST = 1 << 30


@dataclass(frozen=True, slots=True)
class Setting:
    """One run."""

    policy: str
    """`none`, `oracle`, or a length policy with its options, such as `fixed:k=3`."""
    drafter: str
    batch: int
    """Requests that run at once: always so many without `arrivals`, at most so many with them."""
    tokens: int = 30_000
    """The run ends after so many committed tokens (with arrivals: after the last request)."""
    most: int = 8
    """Most draft tokens per request."""
    prefill: int = 0
    """Most prompt tokens of a step; 0 means that prompts count as read."""
    arrivals: tuple[float, ...] = ()
    """Seconds at which requests arrive."""
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """What a run measured."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds from arrival to last token of every request that ran from its start to its end."""
    lengths: list[float] = field(default_factory=list)
    """Draft tokens verified per sampling request, step by step."""
    prices: list[float] = field(default_factory=list)
    """Slot prices of the steps that had one."""

    @property
    def goodput(self) -> float:
        """Tokens committed per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_latency(self) -> float | None:
        """Mean seconds of a request."""
        return float(np.mean(self.latencies)) if self.latencies else None


class Replay:
    """A trace, what drafters propose on it, and a machine.

    Args:
        trace: recorded requests.
        scripts: proposals by drafter.
        table: what steps take.
    """

    def __init__(self, trace: Sequence[Recorded], scripts: Mapping[str, Script], table: CostTable) -> None:
        self._items = {item.id: item for item in trace}
        self._scripts = scripts
        self._clock = CostModel(table, adapt=False)
        self._draft_costs = {RECORDED + name: cost for name, cost in table.draft.items()}
        self._table = replace(table, draft=self._draft_costs)

    def run(self, setting: Setting) -> Outcome:
        """One policy on one load.

        Raises:
            InputError: the policy or one of its options does not exist.
        """
        drafter, policy = self._policy(setting)
        drafting = Drafting({drafter.name: drafter}, merge_trees=True, vocab_size=2 * WRONG)
        queue = ReplayQueue(
            list(self._items.values()),
            batch=setting.batch,
            prefill=setting.prefill,
            arrivals=setting.arrivals,
            seed=setting.seed,
        )
        outcome = Outcome()
        while setting.arrivals or outcome.tokens < setting.tokens:
            found = queue.next(outcome.seconds)
            if found is None:
                break
            batch, outcome.seconds = found
            self._step(batch, policy, drafting, outcome)
            for request in [item.request for item in batch.items if item.request.finished]:
                if policy is not None:
                    policy.forget(request)
                arrived = queue.finish(request)
                if arrived is not None:
                    outcome.latencies.append(outcome.seconds - arrived)
        return outcome

    def _policy(self, setting: Setting) -> tuple[ScriptedDrafter, LengthPolicy | None]:
        script = self._scripts[setting.drafter]
        costs = setting.drafter in self._draft_costs
        if setting.policy == NONE:
            return ScriptedDrafter(script, cost_per_token=costs), None
        if setting.policy == ORACLE:
            truth = {key: item.output for key, item in self._items.items()}
            oracle = ScriptedDrafter(script, cost_per_token=costs, truth=truth)
            estimates: AcceptanceEstimates = OracleEstimates(script.name, self._right(script, setting.most))
            limits = [DrafterLimits(script.name, setting.most, costs)]
            return oracle, create_policy("auto", {}, limits, estimates, self._cost_model)
        name, options, most = parse_policy(setting.policy, setting.most)
        drafter = ScriptedDrafter(script, cost_per_token=costs)
        limits = [DrafterLimits(script.name, most, costs)]
        estimates = AcceptanceEstimates({script.name: drafter.prior}, by_depth=[script.name] if costs else [])
        return drafter, create_policy(name, check_policy(name, options), limits, estimates, self._cost_model)

    def _right(self, script: Script, most: int) -> Callable[[Request], int]:
        """How many draft tokens of a request would be accepted now."""

        def right(request: Request) -> int:
            item = trace_id(request)
            proposal = script.at(item, request.num_output, most)
            return int(right_nodes(proposal, self._items[item].output[request.num_output :]).sum())

        return right

    def _cost_model(self) -> CostModel:
        return CostModel(self._table)

    def _step(self, batch: ScheduledBatch, policy: LengthPolicy | None, drafting: Drafting, outcome: Outcome) -> None:
        sampling = batch.sampling
        plan = policy.plan(batch, _LONGEST) if policy is not None else PLAIN
        drafted, verified = self._draft(batch, plan, drafting)
        rests = [self._items[trace_id(item.request)].output[item.request.num_output :] for item in sampling]
        walks = tuple(recorded_walk(tree, rest) for tree, rest in zip(verified.trees, rests, strict=True))
        context = sum(item.start + item.num_tokens for item in batch.items)
        size = np.array([float(batch.num_tokens + verified.num_nodes)])
        forward = float(self._clock.table_seconds(size, len(batch.items), context)[0])
        seconds = forward + sum(drafted.seconds.values())
        outcome.seconds += seconds
        if policy is not None and sampling:
            done = AcceptedStep(
                batch, plan, drafted, verified, _NO_SCORES, 0.0, acceptance=Acceptance(walks), forward_seconds=forward
            )
            policy.learn(step_stats(done, seconds, {}))
        for item in batch.items:
            item.request.num_computed += item.num_tokens
        for item, walk in zip(sampling, walks, strict=True):
            self._commit(item.request, walk, outcome)
        outcome.steps += 1
        outcome.draft_tokens += verified.num_nodes
        outcome.lengths.append(verified.num_nodes / max(len(sampling), 1))
        price = verified.slot_price if plan.slot_price is None else plan.slot_price
        if price is not None:
            outcome.prices.append(price)

    def _draft(self, batch: ScheduledBatch, plan: SpecPlan, drafting: Drafting) -> tuple[DraftBatch, DraftBatch]:
        if not plan.looks_ahead:
            nothing = DraftBatch((EMPTY_TREE,) * len(batch.sampling))
            return nothing, nothing
        drafted = drafting.draft(batch, plan)
        depth = max((len(tree) for tree in drafted.trees), default=0)
        drafted = replace(drafted, seconds={name: self._draft_seconds(name, depth, batch) for name in drafted.seconds})
        return drafted, trim(drafted, plan)

    def _draft_seconds(self, name: str, depth: int, batch: ScheduledBatch) -> float:
        cost = self._draft_costs.get(name)
        return 0.0 if cost is None else cost.seconds(depth, len(batch.sampling))

    def _commit(self, request: Request, walk: Walk, outcome: Outcome) -> None:
        request.token_ids.extend(walk.tokens)
        request.num_computed = len(request.token_ids) - 1
        outcome.tokens += len(walk.tokens)
        outcome.accepted_tokens += len(walk.path)
        if request.num_output >= request.params.max_tokens:
            request.finish_reason = FinishReason.LENGTH


def recorded_walk(tree: DraftTree, rest: Sequence[int]) -> Walk:
    """What of a tree agrees with the rest of a recorded output, which it never completes alone."""
    path = np.flatnonzero(right_nodes(tree, rest)).tolist() if len(tree) else []
    path = path[: len(rest) - 1]
    return Walk(tuple(path), tuple(rest[: len(path) + 1]))


def parse_policy(text: str, most: int) -> tuple[str, dict[str, str], int]:
    """Name, options and largest length of a policy such as `fixed:k=3` or `threshold:p=0.5`.

    Raises:
        InputError: it cannot be read, or does not exist.
    """
    if text == "fixed":
        raise InputError(
            "fixed needs a length.", field="--policy", fix="Write fixed:k=3, or best-fixed for all of them."
        )
    try:
        spec = parse_speculation(f"ngram@{text}")
        if spec.policy == "fixed":
            length = spec.drafters[0].k
            assert length is not None, "the parser gives every drafter a length under this policy"
            return "fixed", {}, length
        check_policy(spec.policy, spec.policy_options)
    except SpeculationSpecError as error:
        raise InputError(str(error), field="--policy") from error
    return spec.policy, dict(spec.policy_options), most
