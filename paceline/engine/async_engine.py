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

from paceline.engine.engine import Engine
from paceline.engine.request import Request
from paceline.engine.types import RequestOutput
from paceline.errors import EngineDeadError, PacelineError, RequestError

logger = logging.getLogger(__name__)
_IDLE_SECONDS = 0.05

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

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Run one request and yield its news; leaving the iteration early cancels it.

        Raises:
            RequestError: the engine refuses the request.
            EngineDeadError: the engine has stopped.
        """
        if not self.is_alive:
            raise EngineDeadError("the engine has stopped.", fix="Restart it; its log says why.")
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[News] = asyncio.Queue()
        self._inbox.put(lambda: self._add(request, lambda item: _hand_over(loop, news, item)))
        if self._closed:  # the thread ended meanwhile, and nobody may read the inbox any more
            raise EngineDeadError("the engine has stopped.", fix="Restart it; its log says why.")
        finished = False
        try:
            while not finished:
                item = await news.get()
                if isinstance(item, PacelineError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            if not finished:
                self._inbox.put(lambda: self._abort(request))

    def abort(self, request_id: str) -> None:
        """Cancel a request from any thread; unknown ids are ignored."""
        self._inbox.put(lambda: self.engine.abort(request_id))

    def shutdown(self, timeout: float = 10.0) -> None:
        """Cancel what runs and end the thread."""
        self._stopping.set()
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

    def _add(self, request: Request, deliver: Deliver) -> None:
        try:
            self.engine.add(request)
        except PacelineError as error:
            deliver(error)
        except Exception as error:
            logger.exception("request %s could not be taken in", request.id)
            deliver(RequestError(f"cannot be run: {error}", field="request"))
        else:
            self._open[request.id] = (request, deliver)

    def _abort(self, request: Request) -> None:
        """Cancel this very request, and not another of the same id that was taken in before."""
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


def _hand_over(loop: asyncio.AbstractEventLoop, news: asyncio.Queue[News], item: News) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and its consumer gone with it
        loop.call_soon_threadsafe(news.put_nowait, item)
