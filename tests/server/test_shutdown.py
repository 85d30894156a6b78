"""`paceline serve` as a process: what signals do, and what a taken port does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server_tools import save_tiny
from wire import request_bytes

from paceline.errors import ConfigError
from paceline.server.config import ServerConfig
from paceline.server.run import bind

LONG = {"prompt": "a", "max_tokens": 480, "ignore_eos": True, "stream": True, "speculation": "off"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


class Process:
    """`paceline serve` with its output."""

    def __init__(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "paceline", "serve", str(folder), "--kv-cache-memory", "8MiB", *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
        self.child = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**environment, "NO_COLOR": "1"}
        )
        self.lines: list[str] = []
        self.port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.lines.append(line)
            found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1", line)
            self.port = int(found[1]) if found else self.port

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + 90
        while not self.port:
            assert self.child.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def wait(self, seconds: float = 30) -> int:
        code = self.child.wait(seconds)
        self._reader.join(5)
        return code

    def output(self) -> str:
        return "".join(self.lines)


@contextlib.contextmanager
def running(folder: Path, *flags: str) -> Iterator[Process]:
    """A process that serves, and is gone at the end."""
    process = Process(folder, "--port", "0", *flags)
    try:
        process.wait_until_serving()
        yield process
    finally:
        process.child.kill()
        process.child.wait(10)
        assert process.child.stderr is not None
        process.child.stderr.close()


def _started(client: httpx.Client) -> tuple[httpx.Response, Iterator[str]]:
    """A long stream whose first event has come."""
    response = client.send(client.build_request("POST", "/v1/completions", json=LONG), stream=True)
    lines = response.iter_lines()
    assert next(lines).startswith("data: ")
    return response, lines


def test_the_first_signal_drains(folder: Path) -> None:
    """Running answers are finished, new requests refused with 503 meanwhile; then exit code 0."""
    with running(folder, "--log-format", "json") as process, process.client() as client, process.client() as other:
        assert other.get("/ready").status_code == 200
        response, lines = _started(client)
        process.child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while other.get("/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert other.get("/ready").json() == {"status": "draining"}
        assert other.get("/health").status_code == 200  # alive: an orchestrator must not kill it now
        refused = other.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "draining"
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        response.close()
        assert process.wait() == 0, process.output()
    assert "Traceback" not in process.output()
    assert any("draining" in json.loads(line)["message"] for line in process.lines)


def test_the_second_signal_stops_now(folder: Path) -> None:
    """The stream ends with an error, and the exit code says that not everything was finished."""
    with running(folder) as process, process.client() as client:
        response, lines = _started(client)
        process.child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.child.poll() is None
        process.child.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(10) == 1, process.output()
        assert time.monotonic() - started < 5
        rest = [line for line in lines if line.startswith("data: {")]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_dead"
        response.close()
    assert "Traceback" not in process.output()


def test_idle_and_stuck_connections_do_not_hold_it_up(folder: Path) -> None:
    """SIGINT means the same. Exit code 0 soon, though a client keeps its connection, others send half a request, and
    one never reads what it asked for."""
    with running(folder) as process, contextlib.ExitStack() as stack:
        client = stack.enter_context(process.client())
        assert client.get("/health").status_code == 200
        for data in (b"", b"GET /hea", request_bytes("/v1/completions", b"", "content-length: 9")):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", process.port)))
            sock.sendall(data)
        reader = stack.enter_context(socket.socket())
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        reader.connect(("127.0.0.1", process.port))
        reader.sendall(request_bytes("/openapi.json", b"", method="GET") * 400)
        time.sleep(1.0)
        started = time.monotonic()
        process.child.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, process.output()
        assert time.monotonic() - started < 10


def test_a_second_signal_ends_compiling_too(folder: Path) -> None:
    """Grammars that take seconds, several in a queue: whoever waits for one hears of the stop."""
    slow = 'root ::= root root | "%s"'
    with running(folder) as process, process.client() as client, ThreadPoolExecutor(3) as pool:

        def ask(letter: str) -> httpx.Response:
            body = {"prompt": "a", "structured_outputs": {"grammar": slow % letter}}
            return client.post("/v1/completions", json=body)

        waiting = [pool.submit(ask, letter) for letter in "abc"]
        time.sleep(1.0)
        process.child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.child.send_signal(signal.SIGTERM)
        answers = [future.result() for future in waiting]
        process.wait(10)
    for answer in answers:
        assert answer.status_code in (400, 503), answer.text
        assert answer.json()["error"]["message"]


def test_a_taken_port() -> None:
    """Said before a model is loaded, with the address and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} \(Address already in use\)") as caught:
            bind(ServerConfig(port=port))
    assert caught.value.field == "port"
    assert "--port" in (caught.value.fix or "")
