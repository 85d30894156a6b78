"""The engine: a loop over one step, and the only place that knows the order of the stages.

A step is launched and collected. Where the device draws the samples and every request gets one, the next step is
launched before this one is collected, with samples that only the device knows (`Engine._launch_ahead`, `flight.py`), so
that it does not wait for the host. A request that ends by what is read then leaves one forward behind that nobody looks
at: blocks freed meanwhile are written by later kernels of the same stream only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from paceline.draft.base import Drafter
from paceline.draft.drafting import Drafting
from paceline.engine.commit import Committer
from paceline.engine.draft_tree import EMPTY_TREE
from paceline.engine.feedback import observations
from paceline.engine.flight import (
    all_ended,
    drop_logits,
    guess_roots,
    hold_blocks,
    learn_roots,
    reads_samples_only,
    room_for_guesses,
    room_of,
)
from paceline.engine.learning import Learning
from paceline.engine.refusals import check_request
from paceline.engine.request import FinishReason, Request
from paceline.engine.rng import Repeats, secret_seed
from paceline.engine.types import (
    AcceptedStep,
    DraftBatch,
    InFlight,
    RequestOutput,
    ScheduledBatch,
    SpecPlan,
    StepOutput,
    StepStats,
    Tap,
)
from paceline.errors import RequestError
from paceline.model.runner import ModelRunner
from paceline.plan.base import PLAIN, LengthPolicy
from paceline.plan.trim import trim
from paceline.schedule.scheduler import Scheduler
from paceline.verify.accept import accept
from paceline.verify.base import AcceptanceRule
from paceline.verify.verifier import Verifier

logger = logging.getLogger(__name__)
_NOTHING_PLANNED: tuple[list[Request], SpecPlan] = ([], PLAIN)


@dataclass(frozen=True, slots=True)
class Stages:
    """What a step is made of."""

    scheduler: Scheduler
    policy: LengthPolicy | None
    drafting: Drafting
    verifier: Verifier
    rule: AcceptanceRule
    committer: Committer


class Engine:
    """Runs requests. Not thread-safe: one thread adds, aborts and steps.

    Args:
        stages: the stages of a step; without a policy no draft work is done at all.
        runner: the target (for its timings and vocabulary).
        max_model_len: longest sequence.
        vocab_size: tokens the target can emit.
        eos_token_ids: the model's end tokens.
    """

    def __init__(
        self,
        stages: Stages,
        runner: ModelRunner,
        *,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.stages = stages
        self.runner = runner
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._requests: dict[str, Request] = {}
        self._repeats = Repeats()
        self._news: list[RequestOutput] = []
        self._in_flight: InFlight | None = None
        self._planned: tuple[list[Request], SpecPlan] = _NOTHING_PLANNED
        self._learning = Learning(stages.policy, runner)
        self._left = 0.0
        """When the latest step was returned from."""

    @property
    def drafter_names(self) -> tuple[str, ...]:
        """The drafters that `speculation.drafters` of a request may name."""
        return self.stages.drafting.names

    @property
    def last_stats(self) -> StepStats | None:
        """Of the latest step; None before the first."""
        return self._learning.last_stats

    @property
    def slot_price(self) -> float:
        """Of the latest step in which a policy priced the draft nodes."""
        return self._learning.slot_price

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.stages.scheduler.has_work or bool(self._news)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: see `validate`.
        """
        self.validate(request)
        if self.stages.policy is not None:  # without drafts one seed is one text under every rule
            repeat = self._repeats.count(request.seed, request.sample_index)
            request.secret = secret_seed(request.seed, repeat, request.token_ids, request.prediction_ids)
        self._requests[request.id] = request
        self.stages.scheduler.add(request)

    def validate(self, request: Request) -> None:
        """Check a request without queueing it.

        Raises:
            PromptTooLongError: no room for a single new token.
            RequestError: an id twice, a token outside the vocabulary, or a structured output without its constraint.
        """
        if request.id in self._requests or any(news.request_id == request.id for news in self._news):
            raise RequestError(f"{request.id!r} is running already.", field="request_id")
        limit = min(self.max_model_len, self.stages.scheduler.blocks.num_blocks * self._block_size)
        check_request(request, limit, self.vocab_size, self.drafter_names)

    def is_running(self, request: Request) -> bool:
        """Whether this very request was taken in and has not ended."""
        return self._requests.get(request.id) is request

    def abort(self, request_id: str) -> None:
        """Cancel a request; its blocks are free at once. Unknown and finished ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            request.finish_reason = FinishReason.ABORT
            self._news.append(RequestOutput(request.id, finish_reason=FinishReason.ABORT))
            self._forget(request)

    def abort_all(self) -> None:
        """Cancel everything; the next step reports it."""
        for request_id in list(self._requests):
            self.abort(request_id)

    def step(self) -> StepOutput:
        """Run one step of all requests that fit."""
        news, self._news = tuple(self._news), []
        started = time.perf_counter()
        step, self._in_flight = self._in_flight, None
        if step is not None:  # the time in which nobody called is nobody's
            step.started += started - self._left
            step = None if all_ended(step.batch) else step
        batch = self.stages.scheduler.schedule() if step is None else step.batch
        if not batch.items:
            self.check()
            return StepOutput(news)
        try:
            output = self._run(self._launch_now(batch, started) if step is None else step)
        except Exception as error:
            logger.exception("a step failed; its %d request(s) end with an error", len(batch.items))
            output = self._fail(batch, error)
        if not self.stages.scheduler.has_work:
            self.check()
        self._left = time.perf_counter()
        return StepOutput(news + output.outputs)

    def _run(self, step: InFlight) -> StepOutput:
        """Launch the next step if that can be, and collect this one."""
        ahead = None
        if self._may_run_ahead(step):
            try:
                ahead = self._launch_ahead(step)
            except Exception:
                logger.exception("a step could not be launched behind another; it is launched after it")
            drop_logits(step)
        hold_blocks(step, ahead)
        output = self.collect(step)
        if ahead is not None:
            learn_roots(ahead, self.runner.last_wait, self.runner.last_read)
            self._in_flight = ahead
        return output

    def launch(self, batch: ScheduledBatch, started: float, plan: SpecPlan | None = None) -> InFlight:
        """Everything until the target's forward runs: plan (if there is none yet), draft, trim, verify."""
        stages = self.stages
        if plan is None:
            plan = self._plan(batch)
        drafted = verified = DraftBatch((EMPTY_TREE,) * len(batch.sampling))
        guesses: tuple[int | None, ...] = ()
        if plan.looks_ahead:
            if batch.items[0].carried is None:
                drafted = below = stages.drafting.draft(batch, plan)
            else:
                drafted = stages.drafting.draft(batch, room_for_guesses(plan, batch, self.max_model_len))
                guesses, below = guess_roots(drafted)
            verified = stages.scheduler.reserve_drafts(batch, trim(below, plan))
        return InFlight(batch, plan, drafted, verified, stages.verifier.verify(batch, verified), started, guesses)

    def _plan(self, batch: ScheduledBatch) -> SpecPlan:
        policy = self.stages.policy
        return PLAIN if policy is None else policy.plan(batch, self.max_model_len)

    def _launch_now(self, batch: ScheduledBatch, started: float) -> InFlight:
        """Launch a step behind which nothing runs."""
        (planned, plan), self._planned = self._planned, _NOTHING_PLANNED
        if planned == [item.request for item in batch.items] and batch.num_tokens == len(planned):
            room = room_of(batch, self.max_model_len)  # one more token is known now
            step = self.launch(batch, started, replace(plan, budgets=np.minimum(plan.budgets, room)))
        else:
            step = self.launch(batch, started)
        self._learning.settle(step, started, self._left)
        return step

    def _may_run_ahead(self, step: InFlight) -> bool:
        """Whether the step is collected without what the next forward overwrites."""
        if not 0 < len(step.scores.logits) <= self.runner.most_carried or not reads_samples_only(step):
            return False
        return not any(drafter.taps for drafter in self._shown(step))

    def _launch_ahead(self, step: InFlight) -> InFlight | None:
        """The step after this one, before its samples are read; None where they decide what comes next."""
        batch = self.stages.scheduler.schedule_ahead(step.batch, step.scores.first_row, self.max_model_len)
        if batch is None:
            return None
        plan = self._plan(batch)
        if plan.looks_ahead and self.stages.drafting.needs_last_tokens(plan.drafters):
            self._planned = [item.request for item in batch.items], plan
            return None
        return self.launch(batch, time.perf_counter(), plan)

    def accept(self, step: InFlight) -> AcceptedStep:
        """Wait for the forward, and walk the trees."""
        stages, scores = self.stages, step.scores
        walked = DraftBatch((EMPTY_TREE,) * len(step.verified.trees)) if step.wrong else step.verified
        acceptance = accept(stages.rule, step.batch, walked, scores, self.eos_token_ids)
        return AcceptedStep(
            step.batch,
            step.plan,
            step.drafted,
            step.verified,
            step.scores,
            step.started,
            step.guesses,
            step.wrong,
            acceptance=acceptance,
            forward_seconds=self.runner.last_seconds + scores.transform_seconds,
        )

    def collect(self, step: InFlight) -> StepOutput:
        """Accept, commit, tell plan and drafters, forget what is finished."""
        return self.finish(self.accept(step))

    def finish(self, step: AcceptedStep) -> StepOutput:
        """Commit, tell plan and drafters, forget what is finished."""
        running = [item.request for item in step.batch.items if not item.request.finished]
        outputs = self.stages.committer.commit(step, time.perf_counter())
        try:
            self._feed_back(step)
        except Exception:
            logger.exception("a step could not be learned from; its tokens are committed")
        for request in running:
            if request.finished:
                self._forget(request)
        return StepOutput(outputs)

    def _shown(self, step: InFlight) -> list[Drafter]:
        """The drafters that are shown what the step commits."""
        return self.stages.drafting.observers(step.plan.observers) if self.stages.policy is not None else []

    def _feed_back(self, step: AcceptedStep) -> None:
        stages = self.stages
        seconds: dict[str, float] = {}
        if shown := self._shown(step):
            wanted = any(Tap.TOP_IDS in d.taps for d in shown)
            started = time.perf_counter()
            for observation in observations(step, want_top_ids=wanted):
                stages.drafting.observe(observation, shown)
            tapping = [d.name for d in shown if d.taps]
            seconds = dict.fromkeys(tapping, (time.perf_counter() - started) / max(len(tapping), 1))
        self._learning.take(step, seconds)

    def check(self) -> None:
        """Assert that no block is lost (called whenever the engine is idle)."""
        for blocks in (self.stages.scheduler.blocks, *self.stages.drafting.block_managers()):
            blocks.check()
            if not self.stages.scheduler.has_work:
                used = blocks.counts().used
                assert used == 0, f"{used} block(s) are held by nobody"

    @property
    def _block_size(self) -> int:
        return self.stages.scheduler.blocks.block_size

    def _fail(self, batch: ScheduledBatch, error: Exception) -> StepOutput:
        requests = [item.request for item in batch.items if self.is_running(item.request)]
        outputs = tuple(self.stages.committer.fail(request, error) for request in requests)
        for request in requests:
            self._forget(request)
        return StepOutput(outputs)

    def _forget(self, request: Request) -> None:
        if self.is_running(request):
            del self._requests[request.id]
        self.stages.scheduler.finish(request)
        self.stages.drafting.forget(request)
        if self.stages.policy is not None:
            self.stages.policy.forget(request)
        self.stages.committer.forget(request)
