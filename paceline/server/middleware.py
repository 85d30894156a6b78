"""The gate around the application, as one ASGI middleware: request ids, keys, body limits, admission, disconnects.

It runs before any body is parsed. A body is read whole (it is bounded), so afterwards the only thing that can arrive
is a disconnect: then the application's task is cancelled, which cancels its engine requests.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.server.admission import Admission
from paceline.server.config import ServerConfig
from paceline.server.errors import HTTPError, error_response
from paceline.server.logs import log_request

logger = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/health", "/ready"})
QUIET_PATHS = OPEN_PATHS | {"/metrics"}
COUNTED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
"""Routes whose work takes a place in the queue."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/=+-]{1,128}")

OnHTTP = Callable[[str, int, float], None]


class Gate:
    """The outermost layer of the server.

    Args:
        app: the application behind it.
        config: keys, limits and timeouts.
        admission: the queue.
        on_http: called with path, status and seconds of every answer.
        on_rejected: called with a reason for every refusal made here.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        admission: Admission,
        on_http: OnHTTP,
        on_rejected: Callable[[str], None],
    ) -> None:
        self._app = app
        self._config = config
        self._admission = admission
        self._on_http = on_http
        self._on_rejected = on_rejected
        self._held = 0
        """Bytes of bodies that are being read or worked on."""
        self._most_held = max(16 * config.max_body_bytes, 64 << 20)
        self._keys = [key.encode() for key in config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # a websocket is closed by not being accepted
        exchange = _Exchange(scope, send, self._config.write_timeout)
        started = time.perf_counter()
        try:
            await self._serve(exchange, receive)
        except HTTPError as error:
            self._on_rejected(error.code or "invalid")
            await exchange.fail(error)
        except ClientGone:
            exchange.status = exchange.status or 499  # what proxies log for a client that left
        except asyncio.CancelledError:  # the server stops, and this took too long
            await exchange.fail(HTTPError(503, "the server stopped.", fix="Try again.", code="draining"))
        except Exception as error:
            logger.exception("a request failed", extra={"request_id": exchange.request_id})
            await exchange.fail(error)
        finally:
            self._held -= exchange.body_bytes
            seconds = time.perf_counter() - started
            self._on_http(scope["path"], exchange.status, seconds)
            _log(exchange, seconds)

    async def _serve(self, exchange: _Exchange, receive: Receive) -> None:
        scope = exchange.scope
        if scope["path"] not in OPEN_PATHS:
            self._check_key(scope)
        counted = scope["path"] in COUNTED_PATHS and scope["method"] == "POST"
        if counted:
            self._admission.check()
        body = await self._read(exchange, receive)
        state = scope.setdefault("state", {})
        state["request_id"] = exchange.request_id
        if not counted:
            await self._run(exchange, body, receive)
            return
        state["ticket"] = ticket = self._admission.enter()
        try:
            await self._run(exchange, body, receive)
        finally:
            ticket.leave()

    def _check_key(self, scope: Scope) -> None:
        if not self._keys:
            return
        scheme, _, given = header(scope, b"authorization").partition(b" ")
        # Every key is compared, so that time does not tell which one nearly fits.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise HTTPError(
                401, "the API key is missing or wrong.", fix="Send Authorization: Bearer KEY.", code="invalid_api_key"
            )

    async def _read(self, exchange: _Exchange, receive: Receive) -> bytes:
        """The body.

        Raises:
            HTTPError: 413; 408; 503, the bodies of all requests together are too large.
        """
        limit = self._config.max_body_bytes
        too_large = HTTPError(413, f"the body is larger than {limit} bytes.", code="body_too_large")
        declared = header(exchange.scope, b"content-length")
        if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
            raise too_large
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._config.read_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunks.append(message.get("body", b""))
                    self._hold(exchange, len(chunks[-1]))
                    if exchange.body_bytes > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError as error:
            raise HTTPError(408, "the body did not arrive in time.", code="request_timeout") from error

    def _hold(self, exchange: _Exchange, size: int) -> None:
        exchange.body_bytes += size
        self._held += size
        if self._held > self._most_held:
            raise HTTPError(503, "too many large bodies are in work.", fix="Try again in a moment.", code="queue_full")

    async def _run(self, exchange: _Exchange, body: bytes, receive: Receive) -> None:
        """Run the application, and cancel it when the client goes away."""
        app = asyncio.ensure_future(self._app(exchange.scope, _replay(body), exchange.send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({app, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not app.done():
                raise ClientGone
            app.result()
        finally:
            for task in (app, watcher):
                task.cancel()
            await asyncio.gather(app, watcher, return_exceptions=True)


class ClientGone(Exception):
    """The client closed its connection, or does not read what it asked for."""


class _Exchange:
    """One request with its answer under way."""

    def __init__(self, scope: Scope, send: Send, write_timeout: float) -> None:
        self.scope = scope
        self.status = 0
        self.body_bytes = 0
        given = header(scope, b"x-request-id")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._send = send
        self._write_timeout = write_timeout

    async def send(self, message: Message) -> None:
        """Pass a message on; the first one gets the request id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        try:
            async with asyncio.timeout(self._write_timeout):
                await self._send(message)
        except TimeoutError as error:
            raise ClientGone from error

    async def fail(self, error: Exception) -> None:
        """Answer with an error, unless an answer has begun."""
        if not self.status:
            # The rest of an unread body must not be taken for the next request.
            response = error_response(error, {"connection": "close"})
            await response(self.scope, _never, self.send)


def _log(exchange: _Exchange, seconds: float) -> None:
    """One line per request; probes and scrapes only at level debug."""
    path = exchange.scope["path"]
    if path in QUIET_PATHS and exchange.status < 400 and not logger.isEnabledFor(logging.DEBUG):
        return
    report = exchange.scope.get("state", {}).get("report", dict)()
    log_request(
        logger,
        request_id=exchange.request_id,
        route=path,
        status=exchange.status,
        seconds=seconds,
        **{"prompt_tokens": None, "output_tokens": None, "finish_reason": None, **report},
    )


def header(scope: Scope, name: bytes) -> bytes:
    """A request header's value, empty if there is none."""
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")


def _replay(body: bytes) -> Receive:
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await _never()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
