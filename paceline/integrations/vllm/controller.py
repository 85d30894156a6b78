"""Gives every request its length each step, by the plan code of the engine (`paceline.plan.goodput`).

vLLM drafts at the end of a step what the next one verifies. So a step has two answers to give before it is scheduled:

- `lengths`: how much of the drafts that are there is verified. Survival comes from what was accepted before, by
  position and request, and from how much was drafted; never from the drafted tokens themselves, so that a cut changes
  no law even where draft tokens were sampled.
- `ask`: how much to draft for the next step.

What `learn` takes in afterwards pairs drafts with the step that verified them: their time is that of the step before.
Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.config import SamplingParams
from paceline.engine.request import Request
from paceline.engine.types import Candidates, NodeLabels, ScheduledBatch, ScheduledRequest, SpecPlan, StepStats
from paceline.integrations.vllm.draft_share import DraftShare
from paceline.integrations.vllm.first_costs import FirstCosts
from paceline.integrations.vllm.options import Options
from paceline.integrations.vllm.trials import Trials
from paceline.plan.base import DrafterLimits
from paceline.plan.cost_model import CostModel
from paceline.plan.goodput import GoodputLength, PricedCut
from paceline.plan.survival import AcceptanceEstimates

_CLASSES = 16
"""Positions whose acceptance is told apart."""
_PRIOR = (0.45, 0.75)
"""First guess of the acceptance of the first position, and of the later ones, whose parent was accepted."""
_SEEN_IN_A_TRIAL = 8
"""Requests whose drafts are verified in a step that is only to look, where trimmed drafts cannot be judged."""


@dataclass(frozen=True, slots=True)
class Method:
    """What the controller must know of vLLM's drafter."""

    name: str
    most: int
    """The server's `num_speculative_tokens`."""
    forwards: bool = False
    """Whether a draft takes forwards of its own, one for each position."""
    steerable: bool = True
    """Whether the scheduler can say how much to draft."""
    shows_drafts: bool = True
    """Whether the scheduler sees draft tokens before it schedules them (sync scheduling)."""
    lengths: tuple[int, ...] | None = None
    """Lengths of which every step takes one for the whole batch; None: every request has its own."""


class Answer(NamedTuple):
    """What a step does."""

    lengths: list[int] | None
    """Draft tokens verified for each request; None: none for anybody."""
    ask: int
    """Most tokens to draft for the next step."""


@dataclass(slots=True)
class Step:
    """One step, from its answer to its result."""

    requests: tuple[Request, ...]
    """Those that decode."""
    kept: list[int]
    """Draft tokens verified for each of them."""
    drafted: list[int]
    """Draft tokens that there were."""
    asked: int
    """Asked for in the step before, so verified or trimmed in this one."""
    asks: int
    """Asked for in this step."""
    price: float | None = None
    """Survival of the last draft token that was worth its slot."""
    tokens: Sequence[Sequence[int]] = ()
    """The draft tokens, where they are known, to tell afterwards whether the first trimmed one was right."""

    def was_right(self, row: int, committed: Sequence[int]) -> bool:
        """Whether a request's first trimmed draft token is the one that came behind the verified ones."""
        if not self.tokens:
            return False
        kept, draft = self.kept[row], self.tokens[row]
        return len(committed) == kept + 1 and len(draft) > kept and draft[kept] == committed[kept]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a step."""

    rows: list[int]
    """Requests (numbers in `Step.requests`) that have tokens."""
    committed: list[int]
    """Tokens of each of them."""
    hits: list[bool]
    """Whether the first trimmed draft token of each was the one that came (where it has no label otherwise)."""
    num_prompt_tokens: int
    num_sequences: int
    seconds: float
    draft_seconds: float = 0.0
    """What the drafter says itself; 0: nothing."""


class Controller:
    """The pace of one vLLM engine.

    Args:
        method: vLLM's drafter.
        options: the user's.
        max_model_len: most tokens of a sequence.
    """

    def __init__(self, method: Method, options: Options, max_model_len: int) -> None:
        self.method = method
        self._options = options
        self._max_model_len = max_model_len
        keys = min(method.most, _CLASSES)
        self._keys = np.minimum(np.arange(method.most), keys - 1)
        prior = np.array([_PRIOR[0]] + [_PRIOR[1]] * (keys - 1))
        deep = (method.name,) if method.forwards else ()
        self.estimates = AcceptanceEstimates({method.name: prior}, by_depth=deep)
        self._first = FirstCosts()
        self._drafting = DraftShare()
        self._trials = Trials()
        self._cost: CostModel | None = None
        self._policy: GoodputLength | None = None
        self._batch: tuple[tuple[Request, ...], ScheduledBatch] = (), _batch((), 0)
        self._plan: SpecPlan | None = None
        self._asked = 0
        self._drafted_for = 0.0
        """Seconds that drafting for the step which is to be learned next took."""
        self._trial = False

    @property
    def warm(self) -> bool:
        """Whether costs are known, so that the plan decides."""
        return self._policy is not None

    def answer(self, requests: tuple[Request, ...], drafted: Sequence[int], prompt_tokens: int = 0) -> Step:
        """Decide a step.

        Args:
            requests: that decode.
            drafted: draft tokens that each of them has.  # [len(requests)]
            prompt_tokens: expected in the same step.
        """
        asked = self._asked
        self._asked, kept, price = 0, [0] * len(requests), None
        if requests:
            trial = self._trials.ask(len(requests))
            plan = self._new_plan(requests, prompt_tokens)
            price = None if plan is None else plan.slot_price
            if any(drafted):
                kept, price = self._cut(requests, drafted, plan, price)
            self._asked = self._ask(requests, plan, trial)
            self._plan, self._trial = plan, trial is True
        if not self.method.steerable:
            self._asked = self.method.most
        return Step(requests, kept, list(drafted), asked, self._asked, price)

    def learn(self, step: Step, result: Result) -> StepStats | None:
        """Take in what came of a step, in the order of `answer`; None while there is nothing to learn with."""
        decoding = len(step.requests)
        steerable = self.method.steerable
        if self._cost is None or self._policy is None:
            tokens = decoding + sum(step.kept) + result.num_prompt_tokens
            asks = bool(step.asks) and steerable
            self._first.add(tokens, result.num_prompt_tokens, asked=asks, seconds=result.seconds)
            if self._first.ready:
                self._start()
            self._learn_labels(step, result)
            return None
        drafting = 0.0
        if steerable and not result.num_prompt_tokens and decoding:
            size = sum(step.kept)
            rest = float(self._cost.step_seconds(decoding, size, decoding, 0.0)[-1])
            drafting = self._drafting.split(result.seconds, rest, decoding, step.asks, result.draft_seconds)
        before, self._drafted_for = self._drafted_for, drafting
        if not result.rows:
            return None
        stats = self._stats(step, result, result.seconds - drafting, before if step.asked else 0.0)
        self._policy.learn(stats)
        return stats

    def forget(self, request: Request) -> None:
        """Drop a finished request."""
        (self._policy or self.estimates).forget(request)
        self._batch = (), _batch((), 0)

    def _start(self) -> None:
        """Costs are known: let the plan decide from now on."""
        method = self.method
        self._cost = CostModel(self._first.table())
        limits = DrafterLimits(method.name, method.most, method.forwards)
        self._policy = GoodputLength(
            [limits], self.estimates, self._cost, share=self._options.share, protect=self._options.protect, stops=False
        )

    def _new_plan(self, requests: tuple[Request, ...], prompt_tokens: int) -> SpecPlan | None:
        if self._policy is None:
            return None
        before, batch = self._batch
        if prompt_tokens or before != requests:
            batch = _batch(requests, prompt_tokens)
            self._batch = () if prompt_tokens else requests, batch
        return self._policy.plan(batch, self._max_model_len)

    def _cut(
        self, requests: tuple[Request, ...], drafted: Sequence[int], plan: SpecPlan | None, price: float | None
    ) -> tuple[list[int], float | None]:
        """How much of each draft is verified, and the price of a slot."""
        method, table = self.method, self.estimates.requests
        known = table.batch(requests, self._max_model_len)
        most = np.minimum(np.array(drafted), known.caps)  # [num_requests]
        if plan is None or self._trial:
            return self._in_full(most), price
        if method.lengths is not None:
            if not method.steerable:
                most = np.minimum(most, self._common_length(requests, plan))
            return most.tolist(), price
        made = plan if plan.looks_ahead else self._plan
        if made is None or not isinstance(made.cut, PricedCut):
            return ([0] * len(requests) if method.shows_drafts else self._glimpse(most)), price
        survival = self.survival(requests, known.rows)  # [num_requests, most]
        there = np.arange(method.most) < most[:, None]
        request, worth = there.nonzero()[0], survival[there]
        cut = made.cut
        if cut.weights is not None:
            if len(cut.weights) == len(requests):
                worth = worth * cut.weights[request]
            else:
                cut = replace(cut, weights=None)
        order = (-worth).argsort(kind="stable")
        ordered = survival[there][order]
        size = cut.size(Candidates(ordered, request[order], np.zeros(len(requests), dtype=np.int64)))
        if not size and not plan.looks_ahead and not method.shows_drafts:
            return self._glimpse(most), 1.0
        lengths: list[int] = np.bincount(request[order[:size]], minlength=len(requests)).tolist()
        return lengths, float(ordered[size - 1]) if size else 1.0

    def _in_full(self, most: IntArray) -> list[int]:
        """Verify all that may be. Where drafts come unasked, first steps that are no trial verify nothing instead."""
        if self._policy is None and not self.method.steerable and not self._trial:
            return [0] * len(most)
        lengths: list[int] = most.tolist()
        return lengths

    def _glimpse(self, most: IntArray) -> list[int]:
        """Verify one draft token of a few requests: where trimmed drafts are unknown, only that tells their worth."""
        lengths = np.zeros(len(most), dtype=np.int64)
        lengths[most.nonzero()[0][:_SEEN_IN_A_TRIAL]] = 1
        result: list[int] = lengths.tolist()
        return result

    def _ask(self, requests: tuple[Request, ...], plan: SpecPlan | None, trial: bool | None) -> int:
        """How much to draft for the next step."""
        method = self.method
        if trial is True or plan is None:
            return method.most if trial else 0
        if trial is False or not plan.looks_ahead:
            return 0
        if method.lengths is not None:
            return self._common_length(requests, plan)
        limit = plan.limits[method.name]
        return min(int(limit if isinstance(limit, int) else limit.max()), method.most)

    def _common_length(self, requests: tuple[Request, ...], plan: SpecPlan) -> int:
        """The length that the whole batch takes."""
        if not isinstance(plan.cut, PricedCut):
            return 0
        survival = self.survival(requests, self.estimates.requests.batch(requests, self._max_model_len).rows)
        lengths = [n for n in self.method.lengths or () if 0 < n <= self.method.most]
        seconds = np.array([self._drafting.expected(len(requests), n) for n in lengths])
        return plan.cut.common_length(survival, lengths, seconds)

    def survival(self, requests: tuple[Request, ...], rows: IntArray) -> FloatArray:
        """Chance that each request's draft is accepted down to each position.  # [num_requests, most]"""
        name = self.method.name
        chances = self.estimates.of_batch(requests, rows, (name,))[name]
        if chances.shape[1] < self.method.most:
            chances = chances[:, self._keys]
        return np.asarray(chances.cumprod(axis=1))

    def _labels(self, step: Step, result: Result) -> NodeLabels:
        """Which positions were right, down to the first that was not.

        A request that committed n tokens accepted n - 1; the next position was wrong if it was verified. If it was
        trimmed, and its token is known, it was right where it is the token that came instead.
        """
        rows = np.array(result.rows, dtype=np.int64)
        drafted = np.array(step.drafted, dtype=np.int64)[rows]
        seen = drafted if self.method.shows_drafts else np.array(step.kept, dtype=np.int64)[rows]
        accepted = np.array(result.committed, dtype=np.int64) - 1
        judged = np.minimum(accepted + 1, seen)  # [len(rows)]
        request = np.arange(len(rows)).repeat(judged)
        starts = (judged.cumsum() - judged).repeat(judged)
        depth = np.arange(len(request)) - starts  # [num_labels], from 0
        hit = depth < accepted[request]
        hits = np.array(result.hits, dtype=np.bool_)
        hit |= (depth == accepted[request]) & hits[request]
        key = self._keys[depth]
        requests = tuple([step.requests[i] for i in result.rows])
        name = self.method.name
        table = self.estimates.requests.batch(requests, self._max_model_len)
        predicted = self.estimates.of_batch(requests, table.rows, (name,))[name][request, key]
        drafter = np.zeros(len(request), dtype=np.int64)
        return NodeLabels((name,), drafter, key, depth + 1, request, predicted, hit)

    def _stats(self, step: Step, result: Result, forward: float, drafting: float) -> StepStats:
        requests = tuple([step.requests[i] for i in result.rows])
        kept = [step.kept[i] for i in result.rows]
        name = self.method.name
        gains = {}
        labels = _NO_LABELS
        if any(step.drafted):
            labels = self._labels(step, result)
        if step.asked:
            gains = {name: self._gain(requests, kept) if any(kept) else 0.0}
        return StepStats(
            requests=requests,
            num_prompt_tokens=result.num_prompt_tokens,
            num_context_tokens=0,
            num_sequences=result.num_sequences,
            committed=np.array(result.committed, dtype=np.int64),
            verified=np.array(kept, dtype=np.int64),
            forward_seconds=forward,
            step_seconds=forward + drafting,
            draft_seconds={name: drafting} if step.asked else {},
            draft_depths={name: step.asked} if step.asked else {},
            gains=gains,
            nodes={name: sum(kept)} if step.asked else {},
            labels=labels,
            slot_price=step.price,
        )

    def _gain(self, requests: tuple[Request, ...], kept: list[int]) -> float:
        """Tokens that the verified nodes were expected to bring."""
        survival = self.survival(requests, self.estimates.requests.batch(requests, self._max_model_len).rows)
        return float(survival[np.arange(self.method.most) < np.array(kept)[:, None]].sum())

    def _learn_labels(self, step: Step, result: Result) -> None:
        """Before there is a plan: of acceptance alone."""
        if result.rows and any(step.drafted):
            self.estimates.learn(self._stats(step, result, result.seconds, 0.0))


def _batch(requests: tuple[Request, ...], prompt_tokens: int) -> ScheduledBatch:
    """The engine's form of a batch in which these decode while others are prefilled."""
    items = [ScheduledRequest(request, 0, 1, True) for request in requests]
    if prompt_tokens:
        items.append(ScheduledRequest(_SOMEBODY, 0, prompt_tokens, False))
    return ScheduledBatch(tuple(items))


_NONE = np.empty(0, dtype=np.int64)
_NO_LABELS = NodeLabels((), _NONE, _NONE, _NONE, _NONE, np.empty(0), np.empty(0, dtype=np.bool_))
_SOMEBODY = Request("prompt", [], 0, SamplingParams(), 0)
