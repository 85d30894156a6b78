"""What callers get back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from paceline.engine.request import Request
from paceline.engine.types import RequestOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """How one sample was produced. `tokens_per_second` is decode only: after the first commit."""

    target_forwards: int
    draft_tokens: int
    accepted_tokens: int
    mean_accepted_length: float
    seconds: float
    ttft_seconds: float
    tokens_per_second: float
    accepted_by: dict[str, int] = field(default_factory=dict)
    cached_tokens: int = 0
    preemptions: int = 0
    target_transform: str | None = None
    """The declared target that was sampled; None: the model itself."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample. `error` is set when `finish_reason` is "error"; other samples are not affected by it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] | None
    seed: int
    stats: GenerationStats
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """All samples of one prompt; the properties are those of the first."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sample."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first sample ended: stop, length, abort or error."""
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Log-probabilities of the first sample, if asked for."""
        return self.outputs[0].logprobs

    @property
    def stats(self) -> GenerationStats:
        """Statistics of the first sample."""
        return self.outputs[0].stats

    @property
    def seed(self) -> int:
        """Seed of the first sample."""
        return self.outputs[0].seed


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """News of a streamed request. `drafters[i]` guessed `token_ids[i]`, which released the text `pieces[i]`."""

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    drafters: tuple[str | None, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    generation: Generation | None = None
    """The whole result, on the last chunk."""

    @property
    def text(self) -> str:
        """The text of this chunk."""
        return "".join(self.pieces)


class Collector:
    """Gathers one request's news into a completion; with `keeps_news`, one by one for a stream too."""

    def __init__(self, request: Request, *, keeps_news: bool = False) -> None:
        self.request = request
        self.finished = False
        self.unread: deque[RequestOutput] = deque()
        """News that a stream has not passed on yet."""
        self._keeps_news = keeps_news
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._error: str | None = None

    def add(self, news: RequestOutput) -> None:
        """Take in a step's news."""
        if self._keeps_news:
            self.unread.append(news)
        self.finished = news.finish_reason is not None
        self._pieces.extend(news.pieces)
        if news.logprobs:
            self._logprobs.extend(news.logprobs)
        self.prompt_logprobs = news.prompt_logprobs or self.prompt_logprobs
        self._error = news.error

    def completion(self) -> Completion:
        """The finished sample."""
        request = self.request
        assert request.finish_reason is not None, "the request is still running"
        return Completion(
            index=request.sample_index,
            text="".join(self._pieces),
            token_ids=tuple(request.output_ids),
            finish_reason=request.finish_reason.value,
            logprobs=tuple(self._logprobs) if request.params.logprobs is not None else None,
            seed=request.seed,
            stats=generation_stats(request),
            error=self._error,
        )


def generation_stats(request: Request) -> GenerationStats:
    """Statistics of a finished request."""
    stats = request.stats
    first, last = stats.first_token or stats.arrival, stats.last_token or stats.arrival
    decoded = request.num_output - stats.first_count
    return GenerationStats(
        target_forwards=stats.target_forwards,
        draft_tokens=stats.draft_tokens,
        accepted_tokens=stats.accepted_tokens,
        mean_accepted_length=request.num_output / stats.target_forwards if stats.target_forwards else 0.0,
        seconds=last - stats.arrival,
        ttft_seconds=first - stats.arrival,
        tokens_per_second=decoded / (last - first) if last > first else 0.0,
        accepted_by=dict(stats.accepted_by),
        cached_tokens=stats.cached_tokens,
        preemptions=stats.preemptions,
        target_transform=stats.target_transform,
    )
