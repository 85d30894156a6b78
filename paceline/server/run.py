"""Running the application under uvicorn: loading, signals, draining.

The first SIGTERM or SIGINT makes the server refuse new requests and wait for the running ones; a second one stops at
once. The listening socket stays open while draining, so that load balancers see 503 on /ready rather than nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from paceline.errors import ConfigError
from paceline.server.app import create_app
from paceline.server.config import ServerConfig
from paceline.server.connection import Connection
from paceline.server.service import Service

logger = logging.getLogger(__name__)
_KEEP_ALIVE_SECONDS = 75
"""Longer than the 60 s of common proxies, so that they close idle connections and not we."""
_STOP_SECONDS = 1
"""After a second signal, for errors to reach those who wait."""
_POLL_SECONDS = 0.05
_LAST_SECONDS = 5
"""After draining: how long clients have to take the last bytes of their answers."""


class DrainingServer(uvicorn.Server):
    """uvicorn with Paceline's way of stopping.

    Args:
        config: uvicorn's.
        service: the served model.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None
        self.stopped_at_once = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the loop; do not raise them again at the end, since a drained server exits with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        original = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in original.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """First signal: drain. Second: stop now."""
        if self._service.admission.draining:
            self.stop_now()
        else:
            self._service.admission.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        names = ", ".join(self._service.names)
        logger.info("serving %s at http://%s/v1 (API document: /openapi.json)", names, address)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's main loop asks ten times a second whether to exit: when draining is over."""
        if self._service.admission.draining and self._drain is None:
            logger.info("draining: %d request(s) still run; a second signal stops at once", self._open())
            self._drain = asyncio.create_task(self._wait_until_empty())
        return await super().on_tick(counter)

    def stop_now(self) -> None:
        """Cancel everything; whoever still waits is told by an error."""
        self.stopped_at_once = True
        self._service.stop_now()
        self.config.timeout_graceful_shutdown = _STOP_SECONDS
        self.should_exit = True

    def _open(self) -> int:
        return self._service.admission.open

    async def _wait_until_empty(self) -> None:
        while self._open() and not self.should_exit:
            await asyncio.sleep(_POLL_SECONDS)
        self.should_exit = True


def settings_of(service: Service, config: ServerConfig) -> uvicorn.Config:
    """uvicorn's settings."""
    timeouts = {"read_timeout": config.read_timeout, "write_timeout": config.write_timeout}
    return uvicorn.Config(
        create_app(service),
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        proxy_headers=False,
        http=functools.partial(Connection, **timeouts),  # type: ignore[arg-type]
        timeout_graceful_shutdown=_LAST_SECONDS,
    )


def bind(config: ServerConfig) -> socket.socket:
    """The listening address, taken before anything slow is done; nobody can connect yet.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror or error}).",
            field="port",
            fix="Stop what listens there, or choose another --host or --port.",
        ) from error
    return listener


def serve(service: Service, config: ServerConfig, listener: socket.socket) -> int:
    """Serve until a signal comes.

    Args:
        service: the served model.
        config: settings.
        listener: from `bind`.

    Returns:
        The process's exit code: 0 after draining, 1 if a second signal cut it short.
    """
    service.warm_up()
    server = DrainingServer(settings_of(service, config), service)
    try:
        server.run(sockets=[listener])
    finally:
        service.close()
    logger.info("stopped")
    return 1 if server.stopped_at_once else 0
