"""From a started stream to an answer, whole or in server-sent events. Both endpoints share this; they differ in how
a choice turns news into pieces."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from paceline import __version__
from paceline.engine.async_engine import RequestStream
from paceline.engine.request import FinishReason, Request
from paceline.engine.types import RequestOutput
from paceline.errors import EngineDeadError, PacelineError
from paceline.server.errors import HTTPError, error_body
from paceline.server.protocol.common import RequestMetrics, SamplingBody, Usage
from paceline.server.usage import metrics_of, usage_of

logger = logging.getLogger(__name__)
FINGERPRINT = f"paceline-{__version__}"
_DONE = b"data: [DONE]\n\n"


class Choice(Protocol):
    """One sample in the making. The same pieces make the streamed and the whole answer."""

    reasoning_tokens: int

    def add(self, news: RequestOutput) -> dict[str, Any] | None:
        """Take news in; the choice object of a chunk, or None if there is nothing to tell yet."""
        ...


@dataclass(eq=False)
class Answering:
    """One request's answer under way.

    Args:
        kind: prefix of the answer's id.
        model: name to answer with.
        body: the request, for its stream options.
        stream: news of the engine requests.
        choices: one per engine request, by its id.
        seed: the seed to echo.
        report_metrics: whether speculation statistics were asked for.
        hidden: tokens that the engine makes and the client did not ask for.
    """

    kind: str
    model: str
    body: SamplingBody
    stream: RequestStream
    choices: Mapping[str, Choice]
    seed: int
    report_metrics: bool
    hidden: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the first chunk only."""

    def __post_init__(self) -> None:
        self.id = f"{self.kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    @property
    def requests(self) -> Sequence[Request]:
        """The engine requests."""
        return self.stream.requests

    def usage(self) -> Usage:
        """Token counts so far."""
        reasoning = sum(choice.reasoning_tokens for choice in self.choices.values())
        hidden = min(self.hidden, sum(request.num_output for request in self.requests))
        return usage_of(self.requests, reasoning_tokens=reasoning, hidden=hidden)

    @property
    def target_transform(self) -> str | None:
        """The declared target that was sampled, once a sample has a token; None: the model itself."""
        return next((r.stats.target_transform for r in self.requests if r.stats.target_transform), None)

    def metrics(self) -> RequestMetrics | None:
        """Speculation statistics, if asked for."""
        return metrics_of(self.requests) if self.report_metrics else None

    def report(self) -> dict[str, Any]:
        """What the log says of it."""
        stats = [request.stats for request in self.requests]
        reasons = {request.finish_reason.value if request.finish_reason else "abort" for request in self.requests}
        first = min((s.first_token - s.arrival for s in stats if s.first_token is not None), default=None)
        usage = self.usage()
        return {
            "prompt_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "finish_reason": "+".join(sorted(reasons)),
            "ttft_seconds": None if first is None else round(first, 4),
            "draft_tokens": sum(s.draft_tokens for s in stats),
            "accepted_tokens": sum(s.accepted_tokens for s in stats),
        }

    async def respond(self, chunk_name: str, whole: Callable[[], BaseModel]) -> Response:
        """The response, streamed or whole as the body asks.

        Args:
            chunk_name: `object` of the chunks.
            whole: makes the body of a whole answer once everything has been collected.

        Raises:
            HTTPError, EngineDeadError: see `collect`; a stream reports errors in itself.
        """
        if self.body.stream:
            return EventStream(self.events(chunk_name))
        await self.collect()
        return Response(whole().model_dump_json(), media_type="application/json")

    async def collect(self) -> None:
        """Read the stream to its end.

        Raises:
            HTTPError: 400 or 500, a sample ended with an error.
            EngineDeadError: the engine stopped.
        """
        try:
            async for request, news in self.stream:
                check_news(news)
                self.choices[request.id].add(news)
        finally:
            self.stream.close()

    async def events(self, object_name: str) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error becomes an event of its own."""
        options = self.body.stream_options
        include_usage = bool(options and options.include_usage)
        every_time = include_usage and bool(options and options.continuous_usage_stats)
        extra: dict[str, Any] = {"seed": self.seed, **self.extra}
        try:
            async for request, news in self.stream:
                check_news(news)
                choice = self.choices[request.id].add(news)
                if choice is not None:
                    usage = self.usage().model_dump() if every_time else None
                    more = {"usage": usage} if include_usage else {}
                    if extra and self.target_transform is not None:
                        extra["target_transform"] = self.target_transform
                    yield self._chunk(object_name, [choice], {**extra, **more})
                    extra = {}
            metrics = self.metrics()
            if include_usage or metrics is not None:
                more = {"usage": self.usage().model_dump()}
                if metrics is not None:
                    more["metrics"] = metrics.model_dump()
                yield self._chunk(object_name, [], more)
        except PacelineError as error:
            yield b"data: " + to_json(error_body(error)[1]) + b"\n\n"
        except Exception as error:
            logger.exception("a stream failed")
            yield b"data: " + to_json(error_body(error)[1]) + b"\n\n"
        finally:
            self.stream.close()
        yield _DONE

    def _chunk(self, object_name: str, choices: list[dict[str, Any]], more: Mapping[str, Any]) -> bytes:
        head = {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }
        return b"data: " + to_json({**head, **more}) + b"\n\n"


def check_news(news: RequestOutput) -> None:
    """Turn a sample that did not end by itself into an error.

    Raises:
        HTTPError: 400 or 500, the sample failed by the request's fault or ours.
        EngineDeadError: it was cancelled from inside.
    """
    if news.finish_reason is FinishReason.ERROR and news.error_field is not None:
        message = (news.error or "").removeprefix(f"{news.error_field}: ")
        raise HTTPError(400, message, field=news.error_field, code="invalid_value")
    if news.finish_reason is FinishReason.ERROR:
        raise HTTPError(500, news.error or "the request failed.", code="generation_failed")
    if news.finish_reason is FinishReason.ABORT:
        raise EngineDeadError("the server stopped while this request ran.", fix="Try again.")


class EventStream(Response):
    """Server-sent events from an asynchronous generator, which is closed whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Headers without a length."""
        self.raw_headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        self.raw_headers += [(key.encode(), value.encode()) for key, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send every event as it comes."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
