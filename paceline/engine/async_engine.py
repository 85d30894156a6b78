"""The engine in a thread of its own, for servers: requests go in from an event loop, news comes out to it.

The loop thread never waits for a step. A request whose consumer goes away is cancelled and its blocks are free after
the step that runs then. If the engine thread dies, every open request gets an `EngineDeadError`, and so does every
later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum

from paceline.engine.engine import Engine
from paceline.engine.request import Request
from paceline.engine.types import RequestOutput
from paceline.errors import EngineDeadError, PacelineError, RequestError

logger = logging.getLogger(__name__)
_IDLE_SECONDS = 0.05


class _Accepted(Enum):
    """What a stream hears first when its requests were taken in."""

    YES = True


_ACCEPTED = _Accepted.YES

News = RequestOutput | PacelineError
Deliver = Callable[[News], None]
OnNews = Callable[[Request, RequestOutput], None]


class AsyncEngine:
    """Runs an engine in a background thread.

    Args:
        engine: not to be used by anyone else from now on.
        on_news: called in the engine thread with every news of a request (for metrics); must be quick.
    """

    def __init__(self, engine: Engine, on_news: OnNews = lambda *_: None) -> None:
        self.engine = engine
        self._on_news = on_news
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open: dict[str, tuple[Request, Deliver]] = {}
        self._stopping = threading.Event()
        self._dead: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="paceline-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self._dead is None and not self._stopping.is_set()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def open(self, requests: Sequence[Request]) -> RequestStream:
        """Hand requests in, all of them or none; must be called in a running event loop.

        Raises:
            EngineDeadError: the engine has stopped.
        """
        if not self.is_alive:
            raise _dead_error()
        stream = RequestStream(self, requests)
        self._inbox.put(lambda: self._add(stream))
        if self._closed:  # the thread ended meanwhile, and nobody may read the inbox any more
            raise _dead_error()
        return stream

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Run one request and yield its news; leaving the iteration early cancels it.

        Raises:
            RequestError: the engine refuses the request.
            EngineDeadError: the engine has stopped.
        """
        stream = self.open([request])
        try:
            async for _, news in stream:
                yield news
        finally:
            stream.close()

    def abort(self, request_id: str) -> None:
        """Cancel a request from any thread; unknown ids are ignored."""
        self._inbox.put(lambda: self.engine.abort(request_id))

    def stop(self) -> None:
        """Cancel what runs; the thread ends after the step that it is in."""
        self._stopping.set()

    def shutdown(self, timeout: float = 10.0) -> None:
        """Cancel what runs and end the thread."""
        self.stop()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._take_in()
                if self.engine.has_work:
                    self._publish(self.engine.step().outputs)
            self.engine.abort_all()
            self._publish(self.engine.step().outputs)
        except Exception as error:
            logger.exception("the engine thread died")
            self._dead = error
        finally:
            self._bury()

    def _take_in(self) -> None:
        """Apply what came in; wait a moment if there is nothing to do at all."""
        try:
            if not self.engine.has_work:
                self._inbox.get(timeout=_IDLE_SECONDS)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _add(self, stream: RequestStream) -> None:
        added: list[Request] = []
        try:
            for request in stream.requests:
                self.engine.add(request)
                added.append(request)
                self._open[request.id] = (request, stream.deliver)
        except Exception as error:
            for request in added:
                del self._open[request.id]
                self.engine.abort(request.id)
            if not isinstance(error, PacelineError):
                logger.exception("request %s could not be taken in", stream.requests[len(added)].id)
                error = RequestError(f"cannot be run: {error}", field="request")
            stream.deliver(error)
        else:
            stream.deliver(_ACCEPTED)

    def cancel(self, requests: Sequence[Request]) -> None:
        """Cancel these very requests from any thread, and not others of the same ids; ended ones are ignored."""
        self._inbox.put(lambda: self._abort(requests))

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self.engine.is_running(request):
                self.engine.abort(request.id)

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        for item in outputs:
            found = self._open.get(item.request_id)
            if item.finish_reason is not None:
                self._open.pop(item.request_id, None)
            if found is not None:
                request, deliver = found
                deliver(item)
                self._tell(request, item)

    def _tell(self, request: Request, item: RequestOutput) -> None:
        try:
            self._on_news(request, item)
        except Exception:
            logger.exception("news of request %s could not be counted", request.id)

    def _bury(self) -> None:
        """Tell everyone who still waits, also those whose request has not been taken in."""
        self._closed = True
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                break
            except Exception:
                logger.exception("a request could not be taken in by a dead engine")
        for _, deliver in self._open.values():
            deliver(EngineDeadError("the engine stopped while this request ran.", fix="Restart it and try again."))
        self._open.clear()


class RequestStream:
    """News of requests that were taken in together: an asynchronous iterator of (request, news) until all have ended.

    Args:
        engine: who runs them.
        requests: at least one.
    """

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[News | _Accepted] = asyncio.Queue()
        self._by_id = {request.id: request for request in requests}
        self._accepted = False

    def deliver(self, item: News | _Accepted) -> None:
        """Hand news over from the engine thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its consumer gone with it
            self._loop.call_soon_threadsafe(self._news.put_nowait, item)

    async def accepted(self) -> None:
        """Wait until the engine has taken the requests in.

        Raises:
            RequestError: it refuses one, and runs none.
            EngineDeadError: the engine has stopped.
        """
        if not self._accepted:
            item = await self._news.get()
            if isinstance(item, PacelineError):
                self._by_id.clear()
                raise item
            self._accepted = True

    def __aiter__(self) -> RequestStream:
        """Itself."""
        return self

    async def __anext__(self) -> tuple[Request, RequestOutput]:
        """The next news.

        Raises:
            RequestError, EngineDeadError: see `accepted`.
        """
        await self.accepted()
        if not self._by_id:
            raise StopAsyncIteration
        item = await self._news.get()
        if isinstance(item, PacelineError):
            self._by_id.clear()
            raise item
        assert isinstance(item, RequestOutput)
        request = self._by_id[item.request_id]
        if item.finish_reason is not None:
            del self._by_id[item.request_id]
        return request, item

    def close(self) -> None:
        """Cancel what has not ended."""
        if self._by_id:
            self._engine.cancel(tuple(self._by_id.values()))
            self._by_id.clear()


def _dead_error() -> EngineDeadError:
    return EngineDeadError("the engine has stopped.", fix="Restart it; its log says why.")
