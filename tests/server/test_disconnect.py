"""Clients that go away or stop reading: their blocks are free one step after the engine hears of it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from server_tools import Running, serving
from wire import CHAT, TEXT, check_alive, connection, request_bytes, wait_for

LONG: dict[str, Any] = {"prompt": [1] * 100, "max_tokens": 400, "ignore_eos": True}
TALK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "x" * 80}],
    "max_completion_tokens": 400,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """Without speculation, so that 400 tokens are 400 steps."""
    with serving(engine={"speculation": "none"}, write_timeout=0.5) as running:
        yield running


@contextlib.contextmanager
def watched(server: Running) -> Iterator[list[int]]:
    """Blocks in use at the end of every step after the first cancel; each step takes 5 ms at least."""
    engine = server.service.engine.engine
    blocks = engine.stages.scheduler.blocks
    step, abort = engine.step, engine.abort
    after: list[int] = []
    cancelled: list[str] = []

    def watched_abort(request_id: str) -> None:
        cancelled.append(request_id)
        abort(request_id)

    def watched_step() -> Any:
        before = len(cancelled)
        time.sleep(0.005)
        result = step()
        if before:
            after.append(blocks.counts().used)
        return result

    engine.step, engine.abort = watched_step, watched_abort  # type: ignore[method-assign]
    try:
        yield after
    finally:
        engine.step, engine.abort = step, abort  # type: ignore[method-assign]


def _in_use(server: Running) -> int:
    return int(server.service.engine.engine.stages.scheduler.blocks.counts().used)


CASES = [
    (TEXT, {**LONG, "stream": True}),
    (TEXT, LONG),
    (TEXT, {**LONG, "n": 4, "stream": True}),
    (TEXT, {**LONG, "prompt": ["a", "b" * 50]}),
    (CHAT, {**TALK, "stream": True}),
    (CHAT, {**TALK, "n": 3}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].split('/')[2]}-{len(case[1])}")
@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
def test_blocks_are_free_within_one_step(slow: Running, case: tuple[str, dict[str, Any]], how: str) -> None:
    """However the client goes; a half-closed connection counts as gone, since uvicorn takes it so."""
    path, body = case
    with watched(slow) as after, connection(slow) as sock:
        sock.sendall(request_bytes(path, body))
        wait_for(lambda: _in_use(slow) > 0, "the request runs")
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "shutdown":
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        wait_for(lambda: len(after) > 0 or not slow.service.engine.num_open, "the engine hears of it", 5)
        slow.wait_idle()
    assert after[:1] in ([], [0]), "blocks were still in use after the step that followed the cancel"


def test_others_go_on(slow: Running) -> None:
    """One client's leaving does not touch another one's answer."""
    body = {**LONG, "max_tokens": 60, "seed": 5, "temperature": 1.0}
    alone = slow.post(TEXT, body).json()["choices"][0]["text"]
    with connection(slow) as leaver, connection(slow) as other:
        leaver.sendall(request_bytes(TEXT, {**LONG, "stream": True}))
        wait_for(lambda: _in_use(slow) > 0, "the request runs")
        other.sendall(request_bytes(TEXT, body, "connection: close"))
        time.sleep(0.05)
        leaver.close()
        with slow.client() as client:
            assert client.post(TEXT, json=body).json()["choices"][0]["text"] == alone
    slow.wait_idle()


def test_before_the_first_token(slow: Running) -> None:
    """A client that leaves while its body is tokenised or its grammar compiled."""
    body = {**LONG, "structured_outputs": {"regex": "[a-z]{3,900}"}}
    with connection(slow) as sock:
        sock.sendall(request_bytes(TEXT, body))
        wait_for(lambda: slow.service.admission.open == 1, "the request has come")
    wait_for(lambda: slow.service.admission.open == 0, "its place given back")
    slow.wait_idle()
    check_alive(slow)


def test_a_pipeline_hears_of_it(slow: Running) -> None:
    """Requests sent behind one another on one connection all end with it; uvicorn alone tells the last one only."""
    with connection(slow) as sock:
        sock.sendall(request_bytes(TEXT, {**LONG, "stream": True}) * 3)
        wait_for(lambda: _in_use(slow) > 0, "the first one runs")
    started = time.monotonic()
    wait_for(lambda: not slow.service.engine.num_open, "the first one is cancelled")
    assert time.monotonic() - started < 1.0
    slow.wait_idle()


def _small_send_buffers(server: Running) -> None:
    """New connections take the listening socket's buffer size."""
    listener = socket.socket(fileno=os.dup(server.server.servers[0].sockets[0].fileno()))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    listener.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read(slow: Running, stream: bool) -> None:
    """It is cut off after `write_timeout`: its stream is cancelled, its connection closed, nothing stays in memory."""
    _small_send_buffers(slow)
    body = {**LONG, "max_tokens": 200, "n": 8, "logprobs": 20, "stream": stream}
    connections = slow.server.server_state.connections
    with connection(slow, receive_bytes=4096) as sock:
        sock.sendall(request_bytes(TEXT, body))
        wait_for(lambda: slow.service.admission.open > 0, "the request has come")
        wait_for(lambda: slow.service.admission.open == 0, "it is cut off", 20)
        slow.wait_idle()
        wait_for(lambda: not connections, "its connection is gone", 3)
    check_alive(slow)


def test_a_slow_reader_is_served(slow: Running) -> None:
    """Reading slowly is no fault: every byte that is taken begins the time anew."""
    _small_send_buffers(slow)
    body = {**LONG, "max_tokens": 40, "logprobs": 5, "stream": True}
    with connection(slow, receive_bytes=4096) as sock:
        sock.sendall(request_bytes(TEXT, body, "connection: close"))
        found = b""
        while piece := sock.recv(4096):
            found += piece
            time.sleep(0.02)
    assert found.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    slow.wait_idle()
