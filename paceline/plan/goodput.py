"""`auto`: the price of a verification slot decides how far every request looks ahead.

A step that verifies the node set V is worth the expected tokens of V minus what its time would have brought elsewhere:

    sum of w * s(v) over V  -  goodput * (T(committed + |V|, C) - T(committed, C))

with the long-run goodput as the worth of a second (SmartSpec 2406.14066 generalised from one length to trees; the
fixed point is Dinkelbach's for the ratio of tokens and time). All sizes of V are evaluated, since T may be a step
function. The survival of the last node kept is the slot price. The prompt tokens of a mixed step are paid for by
themselves, so they make its draft nodes neither cheap nor dear (the ratio of a single step would).

Every node pays for the time of the whole batch, so no request's look-ahead costs the others more than it brings in
all. What requests with a greater weight add beyond that may lengthen a step by `share` at most. With `protect` no
request's expected rate may fall more than that share below what it would have without look-ahead, whatever that costs
in goodput.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.engine.draft_progress import KeepDrafting
from paceline.engine.request import Request
from paceline.engine.types import Candidates, ScheduledBatch, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, Sampling, sampling
from paceline.plan.cost_model import CostModel
from paceline.plan.draft_levels import DraftLevels
from paceline.plan.regret import Regret, level_of
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.usage import Usage

SHARE = 0.1
"""Most that a step may be lengthened for requests of greater weight."""
_MAX_BUCKET = 1024
_MEMORY = 0.97
"""Weight of the goodput so far after each step."""
_URGENCY = 8.0
"""Most that a deadline multiplies a request's weight by."""
_EVERY_STEP = 64
"""First steps, in which costs are learned and read anew every time; later every `_KEEP_STEPS`."""
_KEEP_STEPS = 8
_KEPT_TIMES = 64
_SIZE_STEP = 32
"""Times are asked for up to a multiple of so many draft nodes, so that they can be kept while room gets less."""
_LONGEST_REST = 32
"""Steps without a plan at most, after one in which nobody was worth asking."""


@dataclass(frozen=True, slots=True)
class PricedCut:
    """The rule. `times[n]` are expected seconds of the step over n draft nodes."""

    times: FloatArray  # [most + 1]
    goodput: float
    share: float
    protect: float | None = None
    weights: FloatArray | None = None  # [num_sampling]

    def size(self, candidates: Candidates) -> int:
        """The number of candidates of greatest total worth."""
        times = self.times[min(int(candidates.fixed.sum()), len(self.times) - 1) :]
        survival = candidates.survival[: len(times) - 1]
        if not len(survival):
            return 0
        worth, longest = survival, len(survival)
        if self.weights is not None:
            fair = self._best(-np.sort(-survival), times)
            worth = survival * self.weights[candidates.request[:longest]]
            longest = _last(times <= (1.0 + self.share) * times[fair])
        size = self._best(worth[:longest], times)
        while size and self.protect is not None:
            gain = np.bincount(candidates.request[:size], survival[:size], minlength=len(candidates.fixed)).min()
            limit = (1.0 + self.protect) * (1.0 + gain) * times[0]
            if times[size] <= limit:
                break
            size = self._best(worth[: _last(times[:size] <= limit)], times)
        return size

    def common_length(self, survival: FloatArray, lengths: Sequence[int], drafting: FloatArray) -> int:
        """The one length, of those allowed, that is worth most when every request gets it; 0 if none is.

        Args:
            survival: of every request's chain down to each depth.  # [num_sampling, most]
            lengths: that may be chosen.
            drafting: seconds that drafting to each of them takes.  # [len(lengths)]
        """
        best, chosen = 0.0, 0
        for length, seconds in zip(lengths, drafting.tolist(), strict=True):
            nodes = min(length * len(survival), len(self.times) - 1)
            extra = float(self.times[nodes] - self.times[0]) + seconds
            value = float(survival[:, :length].sum()) - self.goodput * extra
            if value > best:
                best, chosen = value, length
        return chosen

    def _best(self, worth: FloatArray, times: FloatArray) -> int:
        """The size of greatest value among the first ones."""
        if not len(worth):
            return 0
        value = worth.cumsum() - self.goodput * (times[1 : len(worth) + 1] - times[0])
        best = int(value.argmax())
        return best + 1 if value[best] > 0.0 else 0


def _last(holds: BoolArray) -> int:
    """The last size for which something holds; times need not ascend, since they are corrected by measurement."""
    return int(holds.nonzero()[0][-1])


class Goodput:
    """Long-run tokens per second by number of requests (finely told apart when they are few)."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float]] = {}  # level -> fading tokens and seconds

    def at(self, requests: int, plain_seconds: float) -> float:
        """Tokens per second that a second is worth; before any measurement, and at least, that of plain decoding."""
        plain = requests / plain_seconds
        sums = self._sums.get(level_of(requests))
        return plain if sums is None else max(sums[0] / sums[1], plain)

    def learn(self, requests: int, tokens: float, seconds: float) -> None:
        """Take in a step."""
        before = self._sums.get(level_of(requests), (0.0, 0.0))
        self._sums[level_of(requests)] = _MEMORY * before[0] + tokens, _MEMORY * before[1] + seconds


@dataclass(frozen=True, slots=True)
class _StepTimes:
    """Expected step times, good for a few steps."""

    seconds: FloatArray  # [most + 1]
    plain: float
    """Of the decoding requests alone, without prompt chunks and draft nodes."""
    best_rate: float
    """Most draft tokens per second of extra time, were all of them accepted."""
    until: int


class _Kept(NamedTuple):
    """A plan that is good for a few steps."""

    plan: SpecPlan
    asked: Sampling
    goodput: float


class GoodputLength:
    """The policy.

    Args:
        drafters: with `most` as their caps.
        estimates: acceptance by class and request.
        cost: what steps take.
        share: most that a step may be lengthened, beyond what goodput asks for, for requests of greater weight.
        protect: most that a request's expected rate may fall below plain decoding, as far as verification decides it;
            None: goodput decides alone.
        stops: whether a draft model can be asked after every forward; otherwise its depth is planned beforehand.
    """

    def __init__(
        self,
        drafters: Sequence[DrafterLimits],
        estimates: AcceptanceEstimates,
        cost: CostModel,
        *,
        share: float = SHARE,
        protect: float | None = None,
        stops: bool = True,
    ) -> None:
        self._drafters = tuple(drafters)
        self._most = sum(d.most for d in drafters)
        self._estimates = estimates
        self._cost = cost
        self._share = share
        self._protect = protect
        self._goodput = Goodput()
        self._usage = Usage()
        self._step = 0
        self._costly = frozenset(d.name for d in drafters if d.cost_per_token)
        self._levels = DraftLevels(estimates, cost, self._usage, dynamic=stops and len(self._costly) == 1)
        self._fixed = frozenset(d.name for d in drafters if d.fixed)
        self._readers = {d.name: d.most for d in drafters if d.most and not d.fixed and not d.cost_per_token}
        """Drafters that read tokens only, and the most that they may propose."""
        self._last_times: FloatArray | None = None
        self._rest_until = 0
        self._resting: tuple[Request, ...] = ()
        self._kept: _Kept | None = None
        self._kept_times: dict[tuple[int, int, int, int], _StepTimes] = {}
        self._plain = Regret() if cost.overlaps and not self._fixed else None

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """Who is asked, how far, and the price of this step."""
        self._step += 1
        if self._plain is not None and (
            # A prompt's end is one step of many, and what it is drafted for then is dear: everything is read first.
            batch.num_tokens > len(batch.items) or self._plain.is_due(len(batch.sampling), self._step)
        ):
            return _NOTHING_PAYS
        if self._step < self._rest_until and _decoding(batch) == self._resting:
            plan = _NOTHING_PAYS if self._kept is None else self._again(self._kept)
            if plan is not None:
                return plan
        asked = sampling(batch, self._estimates.requests, max_model_len, self._most)
        room = int(asked.room.sum())
        if not room:
            return _NOBODY
        times = self._times(batch, asked, min(-(-room // _SIZE_STEP) * _SIZE_STEP, _MAX_BUCKET))
        self._last_times = times.seconds
        goodput = self._goodput.at(len(asked), times.plain)
        limits, depths, stop, steady = self._limits(asked, times, goodput)
        if not limits:
            self._rest(batch, times.plain, models=bool(depths))
            return _NOTHING_PAYS
        weights = self._weights(asked, goodput) if self._estimates.requests.num_special else None
        plan = SpecPlan(
            budgets=asked.room,
            drafters=tuple(limits),
            bucket=min(room, _MAX_BUCKET),
            acceptance=self._estimates.of_batch(asked.requests, asked.rows, limits),
            limits=limits,
            depths=depths,
            keep_drafting=stop,
            cut=PricedCut(times.seconds, goodput, self._share, self._protect, weights),
            fixed=self._fixed,
            weights=weights,
            observers=frozenset(limits),
        )
        if steady and weights is None:
            self._keep(batch, _Kept(plan, asked, goodput))
        return plan

    def learn(self, stats: StepStats) -> None:
        """Update acceptance, costs, goodput, and what the drafters are worth."""
        self._estimates.learn(stats)
        if self._step <= _EVERY_STEP or self._step % _KEEP_STEPS == 0 or self._plain is not None:
            self._cost.learn(stats, self._costly)
        requests = stats.num_sampling
        if not requests:
            return
        if self._plain is not None and not stats.num_prompt_tokens:
            self._plain.learn(stats, self._step)
        seconds = stats.step_seconds
        if stats.num_prompt_tokens:
            seconds *= self._decode_share(stats)
        self._goodput.learn(requests, stats.num_committed, seconds)
        goodput = self._goodput.at(requests, seconds)
        self._usage.learn(stats, goodput, self._node_cost(stats.num_draft_nodes, goodput))

    def forget(self, request: Request) -> None:
        """Drop a finished request's estimates."""
        self._estimates.forget(request)

    def _rest(self, batch: ScheduledBatch, plain: float, *, models: bool) -> None:
        """Do not plan anew before the next look in shadow is due, while the same requests decode; with draft `models`
        that could be asked, for a few steps only."""
        self._resting, self._kept, self._rest_until = _decoding(batch), None, 0
        if self._resting:
            looks = [self._usage.next_look(name, len(self._resting), plain) for name in self._readers]
            self._rest_until = min([*looks, self._step + (_KEEP_STEPS if models else _LONGEST_REST)])

    def _keep(self, batch: ScheduledBatch, kept: _Kept) -> None:
        """Do the same for a few steps, in which expected times hardly change, while the same requests decode."""
        if self._step <= _EVERY_STEP:
            return
        self._resting, self._kept = _decoding(batch), kept
        self._rest_until = self._step + _KEEP_STEPS if self._resting else 0

    def _again(self, kept: _Kept) -> SpecPlan | None:
        """The kept plan with fresh estimates; None where it is time for another."""
        plan, asked, goodput = kept
        readers = [name for name in plan.drafters if name in self._readers]
        if self._usage.paying(readers, len(asked), goodput, alone=not plan.fixed) != readers:
            return None
        known = self._estimates.requests
        left = [known.of(request).longest - len(request.token_ids) for request in asked.requests]
        room = np.minimum(asked.room, left)
        if room.min() <= 0:
            return None
        for name in readers:
            self._usage.asked(name, self._step)
        fresh = self._estimates.of_batch(asked.requests, asked.rows, plan.drafters)
        return replace(plan, budgets=room, bucket=min(int(room.sum()), _MAX_BUCKET), acceptance=fresh)

    def _node_cost(self, nodes: int, goodput: float) -> float:
        """Tokens that each of a step's draft nodes cost on average."""
        times = self._last_times
        if not nodes or times is None:
            return 0.0
        return max(goodput * (times.item(min(nodes, len(times) - 1)) - times.item(0)) / nodes, 0.0)

    def _decode_share(self, stats: StepStats) -> float:
        """The share of a mixed step's time that it would have taken without its prompt tokens."""
        size = stats.num_sampling + stats.num_draft_nodes
        sizes = np.array([size, size + stats.num_prompt_tokens], dtype=np.float64)
        decode, mixed = self._cost.table_seconds(sizes, stats.num_sequences, stats.num_context_tokens)
        return float(decode / mixed)

    def _times(self, batch: ScheduledBatch, asked: Sampling, most: int) -> _StepTimes:
        """Expected times over 0 .. `most` draft nodes; kept for a few steps, in which they hardly change."""
        key = (batch.num_tokens, len(batch.items), most, asked.num_tokens.bit_length())
        known = self._kept_times.get(key)
        if known is not None and self._step < known.until:
            return known
        context = asked.num_tokens + sum([i.start + i.num_tokens for i in batch.items if not i.samples])
        seconds = self._cost.step_seconds(batch.num_tokens, most, len(batch.items), context)
        alone = self._plain.seconds(len(asked)) if self._plain is not None else None
        if alone is not None and batch.num_tokens == len(asked):
            seconds[0] = min(alone, *seconds[1:2].tolist())
        extra = seconds[1:] - seconds[0]
        best = float((np.arange(1, most + 1) / np.maximum(extra, 1e-12)).max())
        if len(self._kept_times) >= _KEPT_TIMES:
            self._kept_times.clear()
        keep_for = 1 if self._step <= _EVERY_STEP else _KEEP_STEPS
        plain = seconds.item(0)
        if batch.num_tokens > len(asked):
            plain = self._cost.step_seconds(len(asked), 0, len(asked), asked.num_tokens).item(0)
        found = self._kept_times[key] = _StepTimes(seconds, plain, best, self._step + keep_for)
        return found

    def _limits(
        self, asked: Sampling, times: _StepTimes, goodput: float
    ) -> tuple[dict[str, int | IntArray], dict[str, int], KeepDrafting | None, bool]:
        """Most nodes of every drafter that is asked, most forwards of those that take their own, who goes on; and
        whether the next steps will ask the same."""
        depth: dict[str, int] = {}
        depths: dict[str, int] = {}
        stop = None
        for d in self._drafters:
            if d.fixed:
                depth[d.name] = d.most
            elif d.cost_per_token and d.most and asked.num_tokens >= d.least_tokens * len(asked):
                depths[d.name], stop = self._levels.plan(d, asked, self._step, times.seconds, goodput)
                depth[d.name] = min(round(depths[d.name] * d.width), d.most)
        paying: list[str] = []
        if times.best_rate > goodput:  # otherwise not even a certain token would pay
            paying = self._usage.paying(self._readers, len(asked), goodput, alone=not any(depth.values()))
        few: dict[str, int | IntArray] = {}
        for name, most in self._readers.items():
            due = self._step >= self._usage.next_look(name, len(asked), times.seconds.item(0))
            if name in paying or due:
                depth[name] = most
                if self._plain is not None and not (name in paying and self._usage.is_proven(name)):
                    few[name] = self._for_few(name, most, asked.room, times.seconds.item(0))
                self._usage.asked(name, self._step)
        limits = {d.name: few.get(d.name, depth[d.name]) for d in self._drafters if depth.get(d.name)}
        steady = not any(depths.values()) and not few and limits.keys() <= self._fixed.union(paying)
        return limits, depths, stop, steady

    def _for_few(self, name: str, most: int, room: IntArray, plain: float) -> int | IntArray:
        """A limit under which a drafter is asked for some of the requests that have room, others every time."""
        (rows,) = room.nonzero()
        few = self._usage.few(name, len(rows), plain)
        if few is None:
            return most
        limits = np.zeros(len(room), dtype=np.int64)
        limits[rows[few]] = most
        return limits

    def _weights(self, asked: Sampling, goodput: float) -> FloatArray | None:
        """What a token of each request is worth; one that would miss its deadline at the common rate weighs more."""
        now, rate = time.perf_counter(), goodput / len(asked)
        weights = []
        for request in asked.requests:
            known = self._estimates.requests.of(request)
            needed = (request.params.max_tokens - request.num_output) / max(known.deadline - now, 1e-3)
            weights.append(known.weight * min(max(needed / rate, 1.0), _URGENCY))
        result = np.array(weights)
        return None if (result == result[0]).all() else result / result.mean()


def _decoding(batch: ScheduledBatch) -> tuple[Request, ...]:
    """The requests of a step in which all of them decode; nobody otherwise."""
    if batch.num_tokens != len(batch.items):
        return ()
    return tuple([item.request for item in batch.items if item.samples])


_NOBODY = SpecPlan(budgets=np.empty(0, dtype=np.int64), drafters=(), bucket=0, acceptance={}, observers=frozenset())
"""Nobody may look ahead, and no drafter spends time on it."""
_NOTHING_PAYS = replace(_NOBODY, slot_price=1.0)
