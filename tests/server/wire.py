"""Plain sockets for tests of what no HTTP client sends, and the checks that all refusals share."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
from server_tools import Running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PROMPT = {"prompt": "hi", "max_tokens": 4}


def check_error(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """Every refusal has OpenAI's shape; the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return str(error["message"])


def check_alive(server: Running) -> None:
    """The engine still answers."""
    assert server.post(TEXT, PROMPT).status_code == 200


@contextlib.contextmanager
def connection(server: Running, *, receive_bytes: int | None = None, seconds: float = 15.0) -> Iterator[socket.socket]:
    """A bare connection; `receive_bytes` makes its window small."""
    parts = urlsplit(server.url)
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(seconds)
    try:
        sock.connect((parts.hostname, parts.port))
        yield sock
    finally:
        sock.close()


def request_bytes(path: str, body: Any, *headers: str, method: str = "POST") -> bytes:
    """One request; bodies that are no bytes are written as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"content-length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def read_all(sock: socket.socket, most: int = 1 << 22) -> bytes:
    """Everything until the server hangs up or the socket's time is over."""
    found = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while len(found) < most and (piece := sock.recv(65536)):
            found += piece
    return found


def read_answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer with a content-length."""
    file = sock.makefile("rb")
    status = int(file.readline().split()[1])
    headers: dict[str, str] = {}
    while (line := file.readline().strip()) and len(headers) < 100:
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, file.read(int(headers.get("content-length", "0")))


def exchange(server: Running, data: bytes, seconds: float = 15.0) -> bytes:
    """Send bytes, and read until the server hangs up."""
    with connection(server, seconds=seconds) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        return read_all(sock)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def held(server: Running) -> Iterator[None]:
    """Inside, the engine makes no step: whatever has been asked for stays under way."""
    engine = server.service.engine.engine
    go = threading.Event()
    original = engine.step

    def step() -> Any:
        assert go.wait(30)
        return original()

    engine.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.step = original  # type: ignore[method-assign]
        go.set()
