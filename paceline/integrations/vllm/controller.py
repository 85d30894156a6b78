"""Gives every request its length each step, by the plan code of the engine (`paceline.plan.goodput`).

vLLM drafts at the end of a step what the next one verifies. So a step has two answers to give before it is scheduled:

- how much of the drafts that are there is verified. Survival comes from what was accepted before, by position and
  request, and from how much was drafted; never from the drafted tokens themselves, so that a cut changes no law even
  where draft tokens were sampled;
- how much to draft for the next step.

With many requests not every step is planned anew: between two plans every request keeps the length that the last price
left it (`wanted`), and the last answer to how much to draft stands. Nothing here imports vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.config import SamplingParams
from paceline.engine.request import Request
from paceline.engine.types import Candidates, NodeLabels, ScheduledBatch, ScheduledRequest, SpecPlan, StepStats
from paceline.integrations.vllm.draft_share import DraftShare
from paceline.integrations.vllm.first_costs import FirstCosts
from paceline.integrations.vllm.options import Options
from paceline.integrations.vllm.step import Method, Result, Step
from paceline.integrations.vllm.trials import Trials
from paceline.plan.base import DrafterLimits
from paceline.plan.cost_model import CostModel
from paceline.plan.goodput import GoodputLength, PricedCut
from paceline.plan.requests import Batch
from paceline.plan.survival import AcceptanceEstimates

_CLASSES = 16
"""Positions whose acceptance is told apart."""
_PRIOR = (0.45, 0.75)
"""First guess of the acceptance of the first position, and of the later ones, whose parent was accepted."""
_GLIMPSE = 8
"""Requests of which one draft token is verified in a look, where trimmed ones cannot be judged."""
_TIME_SHARE, _MOST_SECONDS = 0.015, 40e-6
"""What planning may take of a step's time, and in seconds a step, on average."""
_FIRST_PLANS, _FIRST_SHARE = 40, 4.0
"""Plans in which most is learned, so that they may take so many times more."""
_LONGEST = 32
"""Steps at most that go by one plan."""
_KEEP = 0.9


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
        self._trial = False
        self._changed = False
        """Whether the last plan asked where the one before did not, or the other way round: perhaps only to look."""
        self._since = 0
        self._every = 1
        self._plans = 0
        self._planning = self._step_seconds = 0.0
        self.asked = 0
        """Draft tokens asked for in the last step, for this one."""
        self.wanted: dict[str, int] = {}
        """Most draft tokens that are worth verifying, by request id, until the next plan."""

    @property
    def warm(self) -> bool:
        """Whether costs are known, so that the plan decides."""
        return self._policy is not None

    def is_due(self, requests: int) -> bool:
        """Whether the next step, with about so many requests, is planned anew. Asked once before every step."""
        self._since += 1
        on = self._trials.on(requests) or self._policy is None
        return on or self._changed or self._since >= self._every

    def answer(self, requests: tuple[Request, ...], drafted: Sequence[int], prompt_tokens: int = 0) -> Step:
        """Plan a step.

        Args:
            requests: that decode.
            drafted: draft tokens that each of them has.  # [len(requests)]
            prompt_tokens: expected in the same step.
        """
        step = Step(requests, list(drafted), [0] * len(requests), self.asked, 0)
        self._since = 0
        if requests:
            trial = self._trials.ask(len(requests))
            plan = self._new_plan(requests, prompt_tokens)
            known = self.estimates.requests.batch(requests, self._max_model_len)
            step.price = None if plan is None else plan.slot_price
            step.chances = self._chances(requests, known) if any(drafted) or self.method.lengths else None
            if any(drafted):
                self._cut(step, known, plan)
            else:
                self.wanted = {}  # nothing was weighed, so the next drafts are verified as far as caps allow
            step.asks = self._ask(step, plan, trial)
            self._plan, self._trial = plan, trial is True
        if not self.method.steerable:
            step.asks = self.method.most
        self._changed = bool(step.asks) != bool(self.asked)
        self.asked = step.asks
        return step

    def wanted_of(self, request: Request) -> int:
        """What is worth verifying of a request that came after the last plan."""
        wish = request.params.speculation
        cap = self.method.most if wish is None or wish.cap is None else wish.cap
        length = 0 if wish is not None and wish.off else min(cap, self.method.most)
        self.wanted[request.id] = length
        return length

    def learn(self, step: Step, result: Result) -> StepStats | None:
        """Take in what came of a planned step, in the order of `answer`; None where there was nothing to learn."""
        count = len(step.requests)
        steerable = self.method.steerable
        drafting = 0.0
        if self._cost is None:
            tokens = count + sum(step.kept) + result.num_prompt_tokens
            asks = bool(step.asks) and steerable
            self._first.add(tokens, result.num_prompt_tokens, asked=asks, seconds=result.seconds)
        elif steerable and count and not result.num_prompt_tokens:
            rest = float(self._cost.step_seconds(count, sum(step.kept), count, 0.0)[-1])
            drafting = self._drafting.split(result.seconds, rest, count, step.asks, result.draft_seconds)
        stats = None
        if result.rows:
            before = self._drafting.expected(count, step.asked) if steerable else 0.0
            stats = self._stats(step, result, result.seconds - drafting, before)
            if self._policy is not None:
                self._policy.learn(stats)
            else:
                self.estimates.learn(stats)
        if self._cost is None and self._first.ready:
            self._start()
        return stats

    def spent(self, seconds: float, step_seconds: float) -> None:
        """Take in what planning a step, reading it and learning from it took; so seldom is planned anew."""
        self._planning = _KEEP * (self._planning or seconds) + (1.0 - _KEEP) * min(
            seconds, 4.0 * self._planning or seconds
        )
        self._step_seconds = _KEEP * (self._step_seconds or step_seconds) + (1.0 - _KEEP) * step_seconds
        self._plans += 1
        allowed = min(_TIME_SHARE * self._step_seconds, _MOST_SECONDS)
        if self._plans < _FIRST_PLANS:
            allowed *= _FIRST_SHARE
        self._every = min(math.ceil(self._planning / allowed), _LONGEST)

    def forget(self, request: Request) -> None:
        """Drop a finished request."""
        self.estimates.forget(request)
        self.wanted.pop(request.id, None)
        self._batch = (), _batch((), 0)

    def _start(self) -> None:
        """Costs are known: let the plan decide from now on."""
        method, options = self.method, self._options
        self._cost = CostModel(self._first.table())
        limits = DrafterLimits(method.name, method.most, method.forwards)
        self._policy = GoodputLength(
            [limits], self.estimates, self._cost, share=options.share, protect=options.protect, stops=False
        )

    def _new_plan(self, requests: tuple[Request, ...], prompt_tokens: int) -> SpecPlan | None:
        if self._policy is None:
            return None
        before, batch = self._batch
        if prompt_tokens or before != requests:
            batch = _batch(requests, prompt_tokens)
            self._batch = () if prompt_tokens else requests, batch
        return self._policy.plan(batch, self._max_model_len)

    def _chances(self, requests: tuple[Request, ...], known: Batch) -> FloatArray:
        name = self.method.name
        return self.estimates.of_batch(requests, known.rows, (name,))[name]

    def _survival(self, chances: FloatArray) -> FloatArray:
        """Chance that each request's draft is accepted down to each position.  # [num_requests, most]"""
        if chances.shape[1] < self.method.most:
            chances = chances[:, self._keys]
        return np.asarray(chances.cumprod(axis=1))

    def _cut(self, step: Step, known: Batch, plan: SpecPlan | None) -> None:
        """How much of each draft is verified, the price of a slot, and what that price leaves everybody."""
        method = self.method
        caps = np.minimum(known.caps, method.most)
        most = np.minimum(np.array(step.drafted), caps)  # [num_requests]
        if plan is None or self._trial:
            # Where drafts come unasked, first steps that are no trial verify nothing instead.
            idle = plan is None and not method.steerable and not self._trial
            most *= most.cumsum() <= max(method.most, len(most) // (1 if plan is None else 2))
            self._keep(step, most * (not idle), caps)
            return
        if method.lengths is not None:
            if not method.steerable:
                most = np.minimum(most, self._common_length(step, plan))
            self._keep(step, most, caps)
            return
        made = plan if plan.looks_ahead else self._plan
        if made is not None and isinstance(made.cut, PricedCut) and step.chances is not None:
            self._cut_by_price(step, most, caps, made.cut)
        else:
            step.price = 1.0
            self._keep(step, most * 0, caps * 0)
        if not plan.looks_ahead and not method.shows_drafts and not any(step.kept):
            for row in most.nonzero()[0][:_GLIMPSE].tolist():
                step.kept[row] = 1

    def _cut_by_price(self, step: Step, most: IntArray, caps: IntArray, cut: PricedCut) -> None:
        assert step.chances is not None, "they were made where there are drafts"
        survival = self._survival(step.chances)
        request, depth = (np.arange(self.method.most) < most[:, None]).nonzero()
        chance = survival[request, depth]
        worth = chance
        if cut.weights is not None:
            if len(cut.weights) == len(most):
                worth = chance * cut.weights[request]
            else:  # somebody came or went since that plan
                cut = replace(cut, weights=None)
        order = (-worth).argsort(kind="stable")
        ordered = chance[order]
        size = cut.size(Candidates(ordered, request[order], np.zeros(len(most), dtype=np.int64)))
        step.price = float(ordered[size - 1]) if size else 1.0
        kept = np.bincount(request[order[:size]], minlength=len(most))
        wanted = np.minimum((survival >= step.price).sum(axis=1), caps) if size else caps * 0
        self._keep(step, kept, np.maximum(wanted, kept))

    def _keep(self, step: Step, kept: IntArray, wanted: IntArray) -> None:
        step.kept = kept.tolist()
        self.wanted = dict(zip([r.id for r in step.requests], wanted.tolist(), strict=True))

    def _ask(self, step: Step, plan: SpecPlan | None, trial: bool | None) -> int:
        """How much to draft for the next step."""
        method = self.method
        if trial is True or plan is None:
            longest = method.most if method.lengths is None else max(method.lengths)
            return longest if trial else 0
        if trial is False or not plan.looks_ahead:
            return 0
        if method.lengths is not None:
            return self._common_length(step, plan)
        limit = plan.limits[method.name]
        return min(int(limit if isinstance(limit, int) else limit.max()), method.most)

    def _common_length(self, step: Step, plan: SpecPlan) -> int:
        """The length that the whole batch takes."""
        if not isinstance(plan.cut, PricedCut) or step.chances is None:
            return 0
        lengths = [n for n in self.method.lengths or () if 0 < n <= self.method.most]
        seconds = np.array([self._drafting.expected(len(step.requests), n) for n in lengths])
        return plan.cut.common_length(self._survival(step.chances), lengths, seconds)

    def _labels(self, step: Step, result: Result, chances: FloatArray) -> NodeLabels:
        """Which positions were right, down to the first that was not.

        A request that committed n tokens accepted n - 1; the next position was wrong if it was verified. If it was
        trimmed, and its token is known, it was right where it is the token that came instead.
        """
        seen = np.array(step.drafted if self.method.shows_drafts else step.kept, dtype=np.int64)[result.rows]
        accepted = np.array(result.committed, dtype=np.int64) - 1
        judged = np.minimum(accepted + 1, seen)  # [len(rows)]
        request = np.arange(len(judged)).repeat(judged)
        depth = np.arange(len(request)) - (judged.cumsum() - judged).repeat(judged)  # [num_labels], from 0
        newest = accepted[request]
        hit = depth < newest
        hit |= (depth == newest) & np.array(result.hits, dtype=np.bool_)[request]
        key = self._keys[depth]
        drafter = np.zeros(len(request), dtype=np.int64)
        return NodeLabels((self.method.name,), drafter, key, depth + 1, request, chances[request, key], hit)

    def _stats(self, step: Step, result: Result, forward: float, drafting: float) -> StepStats:
        """The engine's form of a step; its drafts' time is that of the step before, which made them."""
        name, rows = self.method.name, result.rows
        requests, kept = step.requests, step.kept
        if len(rows) != len(requests):
            requests, kept = tuple([requests[i] for i in rows]), [kept[i] for i in rows]
        labels, gain = _NO_LABELS, 0.0
        if step.chances is not None and any(step.drafted):
            chances = step.chances if len(rows) == len(step.requests) else step.chances[rows]
            labels = self._labels(step, result, chances)
            if any(kept):
                there = np.arange(self.method.most) < np.array(kept)[:, None]
                gain = float(self._survival(chances)[there].sum())
        asked = bool(step.asked)
        return StepStats(
            requests=requests,
            num_prompt_tokens=result.num_prompt_tokens,
            num_context_tokens=0,
            num_sequences=result.num_sequences,
            committed=np.array(result.committed, dtype=np.int64),
            verified=np.array(kept, dtype=np.int64),
            forward_seconds=forward,
            step_seconds=forward + drafting,
            draft_seconds={name: drafting} if asked else {},
            draft_depths={name: step.asked} if asked else {},
            gains={name: gain} if asked else {},
            nodes={name: sum(kept)} if asked else {},
            labels=labels,
            slot_price=step.price,
        )


def _batch(requests: tuple[Request, ...], prompt_tokens: int) -> ScheduledBatch:
    """The engine's form of a batch in which these decode while others are prefilled."""
    items = [ScheduledRequest(request, 0, 1, True) for request in requests]
    if prompt_tokens:
        items.append(ScheduledRequest(_SOMEBODY, 0, prompt_tokens, False))
    return ScheduledBatch(tuple(items))


_NONE = np.empty(0, dtype=np.int64)
_NO_LABELS = NodeLabels((), _NONE, _NONE, _NONE, _NONE, np.empty(0), np.empty(0, dtype=np.bool_))
_SOMEBODY = Request("prompt", [], 0, SamplingParams(), 0)
