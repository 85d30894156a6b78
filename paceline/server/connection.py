"""One HTTP connection: uvicorn's, with the limits that it lacks.

- A request's head has a limit in bytes (431) and in seconds; uvicorn alone would collect headers for ever.
- A client that reads nothing of what it asked for is cut off, also when its answer has been handed over as a whole.
- A disconnect reaches every request of the connection; uvicorn tells only the last one of a pipeline.
- Broken HTTP is answered in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from paceline.server.errors import HTTPError, error_body

MAX_HEAD_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """See the module.

    Args:
        read_timeout: seconds a client may take to send a request's head.
        write_timeout: seconds a client may leave an answer unread.
    """

    def __init__(self, *args: Any, read_timeout: float, write_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_timeout = read_timeout
        self._write_timeout = write_timeout
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        """Runs while a request's head is awaited or incomplete."""
        self._write_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone: tell every request, also those that wait in the pipeline."""
        self._end_head()
        self.resume_writing()
        cycles = [self._running, *(cycle for cycle, _ in self.pipeline)]
        self.pipeline.clear()
        super().connection_lost(exc)
        for cycle in cycles:
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Bytes have come; those of an unfinished head are counted."""
        if self._head_timer is None and not self._answers():
            self._await_head()
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HTTPError(431, f"the head is larger than {MAX_HEAD_BYTES} bytes.", code="head_too_large"))

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._end_head()
        self._await_head()

    def on_headers_complete(self) -> None:
        """A request's head is there."""
        self._end_head()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up, or gone."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(HTTPError(400, msg[:1].lower() + msg[1:], code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: the request is served as an ordinary one, and clients shall not fill the log."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _answers(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._read_timeout, self._head_is_late)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self._answers():  # half a request behind another one, whose answer still takes a while
            self._await_head()
        else:
            self.transport.close()

    def _refuse(self, error: HTTPError) -> None:
        """Answer and hang up; in the middle of another answer only the latter."""
        self._end_head()
        if not self._answers():
            status, body = error_body(error)
            content = to_json(body)
            head = [
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
                "content-type: application/json",
                f"content-length: {len(content)}",
                "connection: close",
            ]
            self.transport.write("\r\n".join([*head, "", ""]).encode() + content)
        self.transport.close()
