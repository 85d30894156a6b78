"""What is no HTTP, or more than anyone needs of it: endless heads, broken requests, pipelines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_tools import Running, serving
from wire import check_alive, exchange, request_bytes

KEY = "key"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """A server with a key and short patience."""
    with serving(api_key=KEY, read_timeout=0.5) as running:
        yield running


@pytest.mark.parametrize("line", [b"x: ", b"GET /"], ids=["header", "target"])
def test_endless_heads(guarded: Running, line: bytes) -> None:
    """Heads have a limit: one long header, one long target (vLLM's CVE-2025-48956)."""
    start = line if line.startswith(b"GET") else b"GET /health HTTP/1.1\r\nhost: x\r\n" + line
    raw = exchange(guarded, start + b"a" * (4 << 20))
    assert raw == b"" or raw.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


def test_endlessly_many_headers(guarded: Running) -> None:
    """The same limit holds for many short ones, and memory is given back."""
    raw = exchange(guarded, b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 500_000)
    assert raw == b"" or raw.startswith(b"HTTP/1.1 431 ")


ABSURD = [
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"NONSENSE / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /health HTTP/1.1\r\nbad header: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\n: x\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n",
    b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\nconnection: close\r\n\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("data", ABSURD, ids=lambda data: repr(data[:40]))
def test_absurd_requests(guarded: Running, data: bytes) -> None:
    """Broken HTTP, smuggled lengths, foreign protocols: a 4xx or a closed connection."""
    raw = exchange(guarded, data, seconds=3)
    assert raw == b"" or raw[9:10] == b"4", raw[:200]


def test_pipelined_requests_are_checked_one_by_one(guarded: Running) -> None:
    """A good key lets in one request, not the next one of the connection."""
    good = request_bytes("/v1/models", b"", f"authorization: Bearer {KEY}", method="GET")
    bad = request_bytes("/v1/models", b"", "connection: close", method="GET")
    raw = exchange(guarded, good + bad)
    assert raw.count(b"HTTP/1.1 200 ") == raw.count(b"HTTP/1.1 401 ") == 1


def test_the_server_lives(server: Running) -> None:
    """A broken request in the middle of a good pipeline ends the connection and nothing else."""
    good = request_bytes("/health", b"", method="GET")
    assert exchange(server, good + b"\x00\xff\r\n\r\n", seconds=3).count(b"HTTP/1.1 200 ") <= 1
    check_alive(server)
