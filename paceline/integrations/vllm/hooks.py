"""The hooks: what is overridden of vLLM's scheduler, sync or async, and how a step is read there.

Every hook of ours is guarded. An exception is logged once and that step goes on as vLLM alone would; after a few of
them the controller is left out for good. The server never dies of it.

In one step, vLLM calls

    schedule               drafts are there: `before` trims them and decides how much to ask for
    _update_after_schedule what is asked for is written into the output, before anything reads it
    update_from_output     tokens have come: read before vLLM works on them (it cuts lists in place), learned after

and `_free_request` for every request that ends, however it ends.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

from paceline.config import SamplingParams
from paceline.engine.request import Request
from paceline.integrations.vllm.asking import BOARD
from paceline.integrations.vllm.clock import StepClock
from paceline.integrations.vllm.controller import Controller
from paceline.integrations.vllm.metrics import Meter
from paceline.integrations.vllm.options import request_speculation
from paceline.integrations.vllm.step import Result, Step

logger = logging.getLogger("vllm.paceline")
_MOST_ERRORS = 3
_MOST_IN_FLIGHT = 64
"""Steps whose result may be outstanding; older ones were given up by vLLM."""


class _InFlight(NamedTuple):
    """A scheduled step, and when that was."""

    step: Step | None
    """None: it goes by the last plan."""
    asks: int
    scheduled: float


class PacedScheduler:
    """Mixed in before vLLM's scheduler class."""

    dynamic_sd_lookup: list[int] | None
    """vLLM's: draft tokens to ask for, by number of requests."""
    _controller: Controller | None = None
    _meter: Meter | None = None

    def pace_with(self, controller: Controller, meter: Meter | None) -> None:
        """Start to set the pace."""
        self._controller, self._meter = controller, meter
        self._clock = StepClock()
        self._known: dict[str, Request] = {}
        self._ended: list[Request] = []
        self._in_flight: dict[int, _InFlight] = {}
        self._next: _InFlight | None = None
        self._errors = 0
        self._stock_lookup = getattr(self, "dynamic_sd_lookup", None)
        if controller.method.steerable and controller.method.lengths is None:
            # With a table of its own vLLM does not pad new requests with draft tokens that do not exist.
            most = self.scheduler_config.max_num_seqs  # type: ignore[attr-defined]
            self.dynamic_sd_lookup = [controller.method.most] * (most + 1)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Trim drafts, then schedule as vLLM does."""
        if self._controller is not None:
            try:
                self._before(self._controller)
            except Exception:
                self._failed()
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        if self._controller is not None and self._next is not None:
            try:
                self._scheduled(self._controller, self._next, scheduler_output)
            except Exception:
                self._failed()
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Read the result, let vLLM work on it, then learn."""
        found = self._in_flight.pop(id(scheduler_output), None) if self._controller is not None else None
        read = None
        if found is not None:
            try:
                read = self._read(found.step, scheduler_output, model_runner_output)
            except Exception:
                self._failed()
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if self._controller is not None and found is not None:
            try:
                self._learn(self._controller, found, read)
            except Exception:
                self._failed()
        return outputs

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if self._controller is not None:
            known = self._known.pop(request.request_id, None)
            if known is not None:  # what is in flight is learned first
                self._ended.append(known)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _before(self, controller: Controller) -> None:
        """Decide this step, and trim the drafts that are there."""
        scheduled = self._clock.scheduled()
        running = self.running  # type: ignore[attr-defined]
        if controller.is_due(len(running)):
            started = perf_counter()
            step = self._plan(controller)
            step.spent = perf_counter() - started
            self._next = _InFlight(step, step.asks, scheduled)
            return
        if controller.asked:
            wanted = controller.wanted.get
            for request in running:
                drafts = request.spec_token_ids
                if drafts:
                    most = wanted(request.request_id, -1)
                    if most < len(drafts):
                        if most < 0:
                            most = controller.wanted_of(self._known.get(request.request_id) or self._add(request))
                        request.spec_token_ids = drafts[:most]
        self._next = _InFlight(None, controller.asked, scheduled)

    def _plan(self, controller: Controller) -> Step:
        """A step that is planned anew."""
        known, decoding, prompt_tokens = self._known, [], 0
        for request in self.running:  # type: ignore[attr-defined]
            if request.is_prefill_chunk or not request.num_output_tokens + request.num_output_placeholders:
                prompt_tokens += request.num_tokens - request.num_computed_tokens
            else:
                decoding.append(request)
        if self.waiting and len(self.running) < self.max_num_running_reqs:  # type: ignore[attr-defined]
            prompt_tokens += self.waiting.peek_request().num_tokens  # type: ignore[attr-defined]
        prompt_tokens = min(prompt_tokens, self.max_num_scheduled_tokens)  # type: ignore[attr-defined]
        requests = tuple([known.get(r.request_id) or self._add(r) for r in decoding])
        tokens = [r.spec_token_ids for r in decoding]
        step = controller.answer(requests, [len(t) for t in tokens], prompt_tokens)
        if controller.method.shows_drafts:
            step.tokens = tokens
        for request, drafts, kept in zip(decoding, tokens, step.kept, strict=True):
            if kept < len(drafts):
                request.spec_token_ids = drafts[:kept]
        return step

    def _scheduled(self, controller: Controller, step: _InFlight, output: Any) -> None:
        """Write what is asked for into vLLM's output, and wait for its result."""
        self._next = None
        if controller.method.steerable:
            output.num_spec_tokens_to_schedule = BOARD.length = step.asks
        if len(self._in_flight) >= _MOST_IN_FLIGHT:
            self._in_flight.clear()
        self._in_flight[id(output)] = step

    def _read(self, step: Step | None, output: Any, model_output: Any) -> Result | None:
        """What came of a planned step, before vLLM works on it; its time is not known yet."""
        drafts = output.scheduled_spec_decode_tokens
        if self._meter is not None:
            self._meter.count(step, drafts, model_output.sampled_token_ids)
        if step is None:
            return None
        started = perf_counter()
        sampled, index = model_output.sampled_token_ids, model_output.req_id_to_index
        scheduled, invalid = output.num_scheduled_tokens, output.num_invalid_spec_tokens or {}
        requests = self.requests  # type: ignore[attr-defined]
        read = Result([], [], [], 0, len(scheduled), 0.0)
        decoded = 0
        for i, request in enumerate(step.requests):
            name = request.id
            if name not in scheduled:  # preempted, or left out for want of memory
                continue
            verified = drafts.get(name, ())
            decoded += 1 + len(verified)
            live, at = requests.get(name), index.get(name)
            if live is None or at is None or live.is_finished() or _is_stale(live):
                continue
            tokens = sampled[at] if sampled else ()
            if not len(tokens):
                continue
            kept = len(verified)
            if invalid and kept:
                kept -= invalid.get(name, 0)
            step.kept[i] = kept
            read.rows.append(i)
            read.committed.append(len(tokens))
            read.hits.append(step.was_right(i, tokens))
        result = replace(read, num_prompt_tokens=output.total_num_scheduled_tokens - decoded)
        step.spent += perf_counter() - started
        return result

    def _learn(self, controller: Controller, found: _InFlight, read: Result | None) -> None:
        busy = bool(self.running or self.waiting)  # type: ignore[attr-defined]
        seconds = self._clock.finished(found.scheduled, busy=busy)
        measured, BOARD.seconds = BOARD.seconds, 0.0
        if found.step is not None and read is not None and read.num_sequences:
            started = perf_counter()
            stats = controller.learn(found.step, replace(read, seconds=seconds, draft_seconds=measured))
            controller.spent(found.step.spent + perf_counter() - started, seconds)
            if self._meter is not None and stats is not None:
                self._meter.expect(stats)
        for request in self._ended:
            controller.forget(request)
        self._ended.clear()

    def _add(self, request: Any) -> Request:
        """The form in which the plan knows a request; its token list is vLLM's own and grows with it."""
        params = request.sampling_params
        made = self._known[request.request_id] = Request(
            id=request.request_id,
            token_ids=request.all_token_ids,
            prompt_len=request.num_prompt_tokens,
            params=SamplingParams(
                max_tokens=max(request.max_tokens, 1),
                speculation=request_speculation(getattr(params, "extra_args", None)),
            ),
            seed=0,
            salt=request.cache_salt or "",
        )
        return made

    def _failed(self) -> None:
        """Log the exception that is being handled; go on without control if they come again and again."""
        self._errors += 1
        self._next = None
        if self._errors == 1:
            logger.exception("Paceline left a step to vLLM alone; further errors are not logged")
        if self._meter is not None:
            self._meter.failed()
        if self._errors >= _MOST_ERRORS:
            logger.error("Paceline is switched off after %d errors; the server goes on without it", self._errors)
            self._controller = None
            self.dynamic_sd_lookup = self._stock_lookup
            BOARD.length = None


def _is_stale(request: Any) -> bool:
    """Whether what comes for a request is older than its preemption (named otherwise before 0.30)."""
    return bool(getattr(request, "num_stale_output_tokens", 0) or getattr(request, "async_tokens_to_discard", 0))
