"""The queue: full means 503 with Retry-After before any work; every kind of ending gives the place back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_tools import Running, events, serving
from wire import (
    CHAT,
    HELLO,
    PROMPT,
    TEXT,
    check_alive,
    check_error,
    connection,
    held,
    read_all,
    read_answer,
    request_bytes,
    wait_for,
)

PLACES = 4
STREAM = {**PROMPT, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """A server with room for four samples: two that run, two that wait."""
    with serving(engine={"max_num_seqs": 2}, max_queued_requests=PLACES - 2, grammar_timeout=5.0) as running:
        yield running


@pytest.fixture(autouse=True)
def _every_place_comes_back(small: Running) -> Iterator[None]:
    yield
    wait_for(lambda: small.service.admission.open == 0, "places given back")
    small.wait_idle()
    check_alive(small)


@contextlib.contextmanager
def filled(server: Running, samples: int = PLACES) -> Iterator[None]:
    """Inside, so many places are taken by requests that do not end; their clients then go away."""
    with held(server), contextlib.ExitStack() as stack:
        for i in range(samples):
            sock = stack.enter_context(connection(server))
            sock.sendall(request_bytes(TEXT, STREAM))
            wait_for(lambda taken=i + 1: server.service.admission.open == taken, "a place taken")  # type: ignore[misc]
        yield


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_full_is_said_before_the_body_is_read(small: Running, path: str) -> None:
    """503 and Retry-After, though not one byte of the body was sent, or what was sent is no JSON."""
    with filled(small):
        for body, header in ((b"", "content-length: 1000"), (b"{", "content-length: 1")):
            with connection(small) as sock:
                sock.sendall(request_bytes(path, body, header))
                status, headers, content = read_answer(sock)
                assert status == 503
                assert int(headers["retry-after"]) >= 1
                assert json.loads(content)["error"]["code"] == "queue_full"
                assert read_all(sock) == b""  # hangs up: the body's rest must not be read as a request


def test_the_rest_of_the_server_answers_while_full(small: Running) -> None:
    """Probes, metrics and models need no place."""
    with filled(small), small.client() as client:
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/version"):
            assert client.get(path).status_code == 200, path
        check_error(client.get(CHAT), 405)


def test_every_sample_counts(small: Running) -> None:
    """`n`, several prompts, and both: each sample takes a place."""
    for body in ({**PROMPT, "n": 3}, {**PROMPT, "prompt": ["a"] * 3}):
        with filled(small, 2):
            response = small.post(TEXT, body)
            check_error(response, 503, code="queue_full")
            assert response.headers["retry-after"]
            wait_for(lambda: small.service.admission.open == 2, "the refused one took no place")
    with filled(small, 2), small.client() as client:
        with pytest.raises(httpx.ReadTimeout):  # two fit: the engine, which is held, has it
            client.post(TEXT, json={**PROMPT, "n": 2}, timeout=0.5)
        wait_for(lambda: small.service.admission.open == 2, "its places given back")


def test_what_never_fits_is_a_400(small: Running) -> None:
    """More samples than places: to try again would be useless."""
    for body in ({**PROMPT, "n": 5}, {**PROMPT, "prompt": ["a"] * 5}, {**PROMPT, "prompt": ["a", "b"], "n": 3}):
        check_error(small.post(TEXT, body), 400, "n")


ENDINGS: dict[str, tuple[str, Any, int]] = {
    "whole": (TEXT, PROMPT, 200),
    "several": (TEXT, {**PROMPT, "n": 4}, 200),
    "stream": (TEXT, STREAM, 200),
    "tokenize": ("/tokenize", {"prompt": "a"}, 200),
    "not JSON": (TEXT, b"{", 400),
    "unknown model": (CHAT, {**HELLO, "model": "x"}, 404),
    "out of range": (CHAT, {**HELLO, "n": 0}, 400),
    "too long": (CHAT, {"messages": [{"role": "user", "content": "x" * 600}], "n": 4}, 400),
    "bad grammar": (TEXT, {**PROMPT, "n": 3, "structured_outputs": {"regex": "("}}, 400),
    "refused by the engine": (TEXT, {**PROMPT, "n": 3, "logit_bias": {"99999": 1}}, 400),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_every_ending_gives_the_places_back(small: Running, name: str) -> None:
    """More often than there are places, so that one lost place would be noticed."""
    path, body, status = ENDINGS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with small.client(headers={"content-type": "application/json"}) as client:
        for _ in range(PLACES + 1):
            assert client.post(path, content=content).status_code == status
            wait_for(lambda: small.service.admission.open == 0, "places given back", 2)


def test_other_content_types_give_the_place_back(small: Running) -> None:
    """As do bodies that never come."""
    with small.client() as client:
        for _ in range(PLACES + 1):
            check_error(client.post(TEXT, content=b"{}"), 415)
    for _ in range(PLACES + 1):
        with connection(small) as sock:
            sock.sendall(request_bytes(TEXT, b"", "content-length: 100"))


def test_failures_inside_give_the_places_back(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected fault is a 500 without a trace of the inside, or an error event where the answer had begun."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("inside knowledge")

    with monkeypatch.context() as patch:
        patch.setattr(small.service, "requests", fail)
        for _ in range(PLACES + 1):
            response = small.post(TEXT, PROMPT)
            assert "inside" not in check_error(response, 500, code="internal_error")
    with monkeypatch.context() as patch:
        patch.setattr("paceline.server.completions.CompletionChoiceState.add", fail)
        for _ in range(PLACES + 1):
            response = small.post(TEXT, STREAM)
            assert response.status_code == 200
            assert events(response)[-1]["error"]["type"] == "server_error"
            assert "inside" not in response.text
        assert "inside" not in check_error(small.post(TEXT, PROMPT), 500)


def test_vanished_clients_give_the_places_back(small: Running) -> None:
    """Streaming, not streaming, and waiting ones."""
    for body in (STREAM, {**STREAM, "stream": False}):
        with held(small), contextlib.ExitStack() as stack:
            for i in range(PLACES):
                stack.enter_context(connection(small)).sendall(request_bytes(TEXT, body))
                wait_for(lambda taken=i + 1: small.service.admission.open == taken, "a place taken")  # type: ignore[misc]
            stack.close()
            wait_for(lambda: small.service.admission.open == 0, "places given back, though the engine stands still")


def test_the_bodies_of_all_requests_together_are_bounded(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies are read before they take a place, so their bytes have a limit of their own, and are given back."""
    gate: Any = small.server.config.app
    large = {**PROMPT, "user": "x" * 2000}
    with monkeypatch.context() as patch:
        patch.setattr(gate, "_most_held", 1500)
        for _ in range(3):
            check_error(small.post(TEXT, large), 503, code="queue_full")
    wait_for(lambda: gate._held == 0, "nothing held")
    assert small.post(TEXT, large).status_code == 200
    wait_for(lambda: gate._held == 0, "nothing held")
