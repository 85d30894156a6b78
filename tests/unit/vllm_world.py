"""The few vLLM types that the hooks touch, as a world with a clock: drafts are right with a given chance, steps take
a given time, and the scheduler hands out tokens as vLLM's does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np


@dataclass(eq=False)
class FakeRequest:
    """As `vllm.v1.request.Request`."""

    request_id: str
    num_prompt_tokens: int = 8
    max_tokens: int = 10_000
    extra_args: dict[str, Any] | None = None
    cache_salt: str | None = None
    spec_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_stale_output_tokens: int = 0
    is_prefill_chunk: bool = False
    finished: bool = False

    def __post_init__(self) -> None:
        self.all_token_ids = list(range(self.num_prompt_tokens))
        self.sampling_params = SimpleNamespace(extra_args=self.extra_args)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - self.num_prompt_tokens

    def is_finished(self) -> bool:
        return self.finished


@dataclass
class FakeOutput:
    """As `SchedulerOutput`."""

    num_scheduled_tokens: dict[str, int]
    scheduled_spec_decode_tokens: dict[str, list[int]]
    total_num_scheduled_tokens: int
    num_spec_tokens_to_schedule: int
    num_invalid_spec_tokens: dict[str, int] | None = None


class FakeScheduler:
    """As `Scheduler`: everything that is running is scheduled, prompts in one chunk."""

    def __init__(self, most: int = 4, max_num_seqs: int = 256) -> None:
        self.running: list[FakeRequest] = []
        self.waiting: list[FakeRequest] = []
        self.requests: dict[str, FakeRequest] = {}
        self.num_spec_tokens = most
        self.max_num_running_reqs = max_num_seqs
        self.max_num_scheduled_tokens = 8192
        self.scheduler_config = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.dynamic_sd_lookup: list[int] | None = None

    def add(self, request: FakeRequest) -> None:
        self.requests[request.request_id] = request
        self.running.append(request)

    def schedule(self) -> FakeOutput:
        scheduled, drafts = {}, {}
        for request in self.running:
            scheduled[request.request_id] = request.num_tokens - request.num_computed_tokens
            if request.spec_token_ids:
                drafts[request.request_id] = request.spec_token_ids
                scheduled[request.request_id] += len(request.spec_token_ids)
                request.spec_token_ids = []
        ask = self.num_spec_tokens
        if self.dynamic_sd_lookup is not None:
            ask = self.dynamic_sd_lookup[len(scheduled)]
        output = FakeOutput(scheduled, drafts, sum(scheduled.values()), ask)
        self._update_after_schedule(output)
        return output

    def _update_after_schedule(self, output: FakeOutput) -> None:
        for name, count in output.num_scheduled_tokens.items():
            self.requests[name].num_computed_tokens += count

    def update_from_output(self, output: FakeOutput, model_output: Any) -> dict[int, Any]:
        for name in output.num_scheduled_tokens:
            request = self.requests.get(name)
            if request is None:
                continue
            tokens = model_output.sampled_token_ids[model_output.req_id_to_index[name]]
            rejected = len(output.scheduled_spec_decode_tokens.get(name, ())) + 1 - len(tokens)
            request.num_computed_tokens -= rejected if name in output.scheduled_spec_decode_tokens else 0
            request.all_token_ids += tokens
            if request.num_output_tokens >= request.max_tokens:
                self.finish(name)
        return {}

    def finish(self, name: str) -> None:
        request = self.requests[name]
        request.finished = True
        self._free_request(request)
        self.running.remove(request)

    def _free_request(self, request: FakeRequest) -> None:
        del self.requests[request.request_id]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@dataclass
class World:
    """A model and a drafter with known habits, and the loop of vLLM's engine around a scheduler.

    `right` gives the chance that the next draft token is right, given that those before were; `step_seconds` the time
    of a step over so many tokens; `draft_seconds` that of a draft.
    """

    scheduler: Any
    clock: Clock
    right: float = 0.7
    step_seconds: Callable[[int], float] = lambda _: 0.01
    draft_seconds: float = 0.0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    verified: list[int] = field(default_factory=list)
    """Draft tokens of every step."""
    asked: list[int] = field(default_factory=list)
    tokens: int = 0
    current: str = ""
    offset: int = 0
    """Of all draft token ids."""
    _made: dict[str, list[int]] = field(default_factory=dict)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        output = self.scheduler.schedule()
        drafts = output.scheduled_spec_decode_tokens
        self.verified.append(sum(map(len, drafts.values())))
        self.asked.append(output.num_spec_tokens_to_schedule)
        sampled = []
        for self.current in output.num_scheduled_tokens:
            sampled.append(self._sample(self._made.get(self.current, []), len(drafts.get(self.current, ()))))
        self.tokens += sum(map(len, sampled))
        index = {name: i for i, name in enumerate(output.num_scheduled_tokens)}
        noise = float(np.exp(0.02 * self.rng.standard_normal()))
        self.clock.time += noise * self.step_seconds(output.total_num_scheduled_tokens)
        ask = output.num_spec_tokens_to_schedule
        self.clock.time += self.draft_seconds if ask else 0.0
        self.scheduler.update_from_output(output, SimpleNamespace(sampled_token_ids=sampled, req_id_to_index=index))
        low = self.offset
        self._made = {r.request_id: self.rng.integers(low, low + 1000, ask).tolist() for r in self.scheduler.running}
        for request in self.scheduler.running:
            request.spec_token_ids = list(self._made[request.request_id])

    def _sample(self, drafts: list[int], verified: int) -> list[int]:
        """What the model says: the draft, as far as it is right, and one token more behind what is verified."""
        right = 0
        while right < len(drafts) and self.rng.random() < self.right:
            right += 1
        kept = min(right, verified)
        return [*drafts[:kept], drafts[kept] if kept < right else -5]


class FakeAsyncScheduler(FakeScheduler):
    """As `AsyncScheduler`: the next step is scheduled before the result of this one, with placeholders for drafts."""

    def _update_after_schedule(self, output: FakeOutput) -> None:
        super()._update_after_schedule(output)
        placeholders = [-1] * output.num_spec_tokens_to_schedule
        for name in output.num_scheduled_tokens:
            request = self.requests[name]
            request.num_output_placeholders += 1 + len(output.scheduled_spec_decode_tokens.get(name, ()))
            request.spec_token_ids = placeholders

    def schedule(self) -> FakeOutput:
        for request in self.running:
            if request.num_output_placeholders:  # what is in flight counts as computed
                request.num_computed_tokens = request.num_tokens - 1
        return super().schedule()

    def update_from_output(self, output: FakeOutput, model_output: Any) -> dict[int, Any]:
        for name in output.num_scheduled_tokens:
            if name in self.requests:
                drafts = output.scheduled_spec_decode_tokens.get(name, ())
                self.requests[name].num_output_placeholders -= 1 + len(drafts)
        return super().update_from_output(output, model_output)


@dataclass
class AsyncWorld(World):
    """Two steps are in flight; the model works on one at a time."""

    in_flight: list[tuple[FakeOutput, int]] = field(default_factory=list)
    """Outputs, and how much was drafted for each."""
    free_at: float = 0.0
    ask: int = 0

    def step(self) -> None:
        output = self.scheduler.schedule()
        drafts = output.scheduled_spec_decode_tokens
        assert all(len(tokens) <= self.ask for tokens in drafts.values()), "more is verified than was drafted"
        self.verified.append(sum(map(len, drafts.values())))
        self.asked.append(output.num_spec_tokens_to_schedule)
        self.in_flight.append((output, self.ask))
        self.ask = output.num_spec_tokens_to_schedule
        if len(self.in_flight) == 2:
            self._result()

    def _result(self) -> None:
        output, drafted = self.in_flight.pop(0)
        drafts = output.scheduled_spec_decode_tokens
        names = list(output.num_scheduled_tokens)
        sampled = [self._sample(list(range(drafted)), len(drafts.get(name, ()))) for name in names]
        self.tokens += sum(map(len, sampled))
        asks = output.num_spec_tokens_to_schedule
        noise = float(np.exp(0.02 * self.rng.standard_normal()))
        seconds = noise * self.step_seconds(output.total_num_scheduled_tokens) + (self.draft_seconds if asks else 0.0)
        self.free_at = max(self.free_at, self.clock.time) + seconds
        self.clock.time = self.free_at
        index = {name: i for i, name in enumerate(names)}
        self.scheduler.update_from_output(output, SimpleNamespace(sampled_token_ids=sampled, req_id_to_index=index))
