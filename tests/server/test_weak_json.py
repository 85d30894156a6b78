"""Bodies whose JSON is hostile: nesting, sizes, equal keys, what is no number or no text, floods of mistakes."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from server_tools import Running
from wire import CHAT, TEXT, check_alive, check_error, connection, read_answer, request_bytes


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(autouse=True)
def _the_engine_lives(server: Running) -> Iterator[None]:
    yield
    server.wait_idle()
    check_alive(server)


def raw_post(client: httpx.Client, path: str, content: bytes, **headers: str) -> httpx.Response:
    return client.post(path, content=content, headers={"content-type": "application/json", **headers})


JSON_TRICKS: dict[str, tuple[bytes, int]] = {
    "deep arrays": (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400),
    "deep objects": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, 400),
    "deep where anything is allowed": (b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 150 + b"1" + b"}" * 151, 400),
    "the last of equal keys counts": (b'{"prompt": "a", "n": 1, "n": 99}', 400),
    "equal keys": (b'{"prompt": "a", "max_tokens": 9999999999, "max_tokens": 2}', 200),
    "big integer": (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", 400),
    "bigger integer": (b'{"prompt": "a", "seed": ' + b"9" * 400_000 + b"}", 400),
    "big exponent": (b'{"prompt": "a", "temperature": 1e999999999}', 400),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400),
    "Infinity": (b'{"prompt": "a", "temperature": Infinity}', 400),
    "-Infinity": (b'{"prompt": "a", "logit_bias": {"1": -Infinity}}', 400),
    "lone surrogate": (b'{"prompt": "\\ud800"}', 400),
    "lone surrogate in a key": (b'{"prompt": "a", "\\udfff": 1}', 400),
    "surrogates as UTF-8": (b'{"prompt": "\xed\xa0\x80"}', 400),
    "overlong UTF-8": (b'{"prompt": "\xc0\x80"}', 400),
    "null characters": (b'{"prompt": "a\\u0000b", "stop": "\\u0000", "max_tokens": 2}', 200),
    "no characters": (b'{"prompt": "\\uffff\\ufffe\\u202e", "max_tokens": 2}', 200),
    "not an object": (b'["prompt"]', 400),
    "prototype": (b'{"prompt": "a", "__proto__": {"n": 9}, "__class__": 1}', 400),
}


@pytest.mark.parametrize("name", JSON_TRICKS)
def test_json_tricks(client: httpx.Client, name: str) -> None:
    """Parsers that recurse, wrap around, or hand on what no text is."""
    content, status = JSON_TRICKS[name]
    response = raw_post(client, TEXT, content)
    assert response.status_code == status, response.text
    assert response.text.encode()
    json.loads(response.text)


def test_deep_metadata(client: httpx.Client) -> None:
    """Fields that take any JSON: nesting is bounded by the parser, before anything walks it."""
    for depth, status in ((100, 200), (150_000, 400)):
        content = b'{"messages": [{"role": "user"}], "max_tokens": 1, "metadata": {"a": %s%s}}'
        assert raw_post(client, CHAT, content % (b"[" * depth, b"]" * depth)).status_code == status


def test_compressed_bodies_are_not_unpacked(client: httpx.Client) -> None:
    """Decompression bombs: 4 GB in a 4 MB body. Encodings are not known at all."""
    content = gzip.compress(b'{"prompt": "a"}')
    check_error(raw_post(client, TEXT, content, **{"content-encoding": "gzip"}), 400, code="invalid_json")


def test_many_tiny_chunks(server: Running) -> None:
    """Triton CVE-2025-23310: every chunk of a body took stack space. Here they add up to one bounded body."""
    started = time.monotonic()
    with connection(server) as sock:
        sock.sendall(request_bytes(TEXT, b"", "transfer-encoding: chunked"))
        sock.sendall(b"1\r\n \r\n" * 300_000 + b"0\r\n\r\n")
        status, _, _ = read_answer(sock)
    assert status == 400
    assert time.monotonic() - started < 10


FLOODS: dict[str, tuple[str, bytes]] = {
    "prompt": (TEXT, b'{"prompt": [%s]}'),
    "prompts": (TEXT, b'{"prompt": [[%s]]}'),
    "content": (CHAT, b'{"messages": [{"role": "user", "content": [%s]}]}'),
    "modalities": (CHAT, b'{"messages": [{"role": "user"}], "modalities": [%s]}'),
    "prediction": (CHAT, b'{"messages": [{"role": "user"}], "prediction": {"type": "content", "content": [%s]}}'),
    "tokens": ("/detokenize", b'{"tokens": [%s]}'),
    "unknown fields": (TEXT, b'{"prompt": "a", %s}'),
    "kwargs": (CHAT, b'{"messages": [{"role": "user"}], "chat_template_kwargs": {%s}}'),
    "logit_bias": (CHAT, b'{"messages": [{"role": "user"}], "logit_bias": {%s}}'),
}


@pytest.mark.parametrize("name", FLOODS)
def test_many_errors_in_one_body(server: Running, name: str) -> None:
    """vLLM: checks of long inputs on the event loop. To list each of a million errors once took 27 s here.

    What others notice of it is the longest time that /health takes meanwhile.
    """
    path, template = FLOODS[name]
    entries = (b'"%x": null' % i for i in range(250_000)) if b"{%s" in template or b", %s" in template else None
    content = template % b",".join(entries or [b"-1"] * 1_000_000)
    slowest = 0.0
    with server.client() as client, server.client() as probe:
        probe.get("/health")
        poster = threading.Thread(target=lambda: check_error(raw_post(client, path, content), 400))
        poster.start()
        while poster.is_alive():
            started = time.monotonic()
            probe.get("/health")
            slowest = max(slowest, time.monotonic() - started)
        poster.join()
    assert slowest < 5.0, "far above what a busy machine adds"
