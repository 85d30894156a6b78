"""The gate in front of the application: keys, request ids, body limits, content types, and what is no HTTP request."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
from server_tools import Running, serving
from wire import (
    CHAT,
    HELLO,
    PROMPT,
    TEXT,
    check_alive,
    check_error,
    connection,
    exchange,
    read_all,
    read_answer,
    request_bytes,
)

KEY, OTHER_KEY = "first-key", "second-key"
LIMIT = 4096
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE")
UNKNOWN = (
    "/",
    "/v1",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/v1/nonesuch",
    "/health/",
    "//health",
    "/metrics/",
    "/READY",
)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """A server with two keys, a small body limit and short patience."""
    with serving(api_key=(KEY, OTHER_KEY), max_body_bytes=LIMIT, read_timeout=0.5) as running:
        yield running


@pytest.fixture(scope="module")
def client(guarded: Running) -> Iterator[httpx.Client]:
    """Without a key."""
    with guarded.client() as client:
        yield client


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_documented_route_needs_the_key(client: httpx.Client) -> None:
    """All of the OpenAPI document but the two probes, by every method; the document itself says the same."""
    document = client.get("/openapi.json", headers=_bearer(KEY)).json()
    assert len(document["paths"]) >= 10
    for template, operations in document["paths"].items():
        is_open = template in ("/health", "/ready")
        assert all(("security" in operation) != is_open for operation in operations.values())
        for method in METHODS:
            response = client.request(method, template.replace("{model}", "tiny"))
            if is_open:
                assert response.status_code == (200 if method == "GET" else 405), (template, method)
            else:
                assert response.status_code == 401, (template, method)
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", UNKNOWN)
def test_unknown_paths_need_the_key_too(client: httpx.Client, path: str) -> None:
    """Nobody without a key learns which routes there are; spellings near the open ones do not open anything."""
    for method in METHODS:
        assert client.request(method, path).status_code == 401, method
    if path not in ("/docs", "/redoc", "/openapi.json"):
        check_error(client.get(path, headers=_bearer(KEY)), 404)


@pytest.mark.parametrize(
    "target", ["/health/../metrics", "/%68ealth/../metrics", "/health%2f..%2fmetrics", "/./metrics"]
)
def test_paths_are_not_normalised(guarded: Running, target: str) -> None:
    """A path that a proxy may read as an open one is none."""
    head = f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert exchange(guarded, head.encode()).startswith(b"HTTP/1.1 401 ")


def test_keys(client: httpx.Client) -> None:
    """Every key fits; nothing else does, and a wrong key is refused before the body is looked at."""
    for key in (KEY, OTHER_KEY):
        assert client.get("/v1/models", headers=_bearer(key)).status_code == 200
    assert client.get("/v1/models", headers={"authorization": f"bearer   {KEY}"}).status_code == 200
    for value in ("", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer é"):
        response = client.get("/v1/models", headers={"authorization": value.encode("latin-1")})
        message = check_error(response, 401, code="invalid_api_key")
        assert KEY not in message
    check_error(client.post(CHAT, content=b"{" * (LIMIT + 1)), 401)
    for name in ("x-api-key", "api-key", "cookie"):
        assert client.get("/v1/models", headers={name: KEY}).status_code == 401
    assert client.get("/v1/models", params={"api_key": KEY}).status_code == 401


def test_request_ids(client: httpx.Client) -> None:
    """A sane id is kept, on refusals too; otherwise a fresh one is made."""
    for given in ("abc", "a-b_c.d:e/f=g+h", "x" * 128):
        for headers in (_bearer(KEY), {}):
            response = client.get("/v1/models", headers={**headers, "x-request-id": given})
            assert response.headers.get_list("x-request-id") == [given]
    made = set()
    for given in ("", "x" * 129, "a b", "é".encode(), b"a\tb", "<script>", 'a"b', "a;b"):
        made.add(client.get("/health", headers={"x-request-id": given}).headers["x-request-id"])
    assert len(made) == 8
    assert all(len(value) == 32 and value.isalnum() for value in made)


@pytest.mark.parametrize("value", [b"a\nx-evil: 1", b"a\r x-evil: 1", b"a\x00b", b"a\x0bb"])
def test_request_ids_cannot_inject_headers(guarded: Running, value: bytes) -> None:
    """Control characters in a header end the connection or make an ordinary header; nothing of them is sent back."""
    raw = exchange(
        guarded, b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: " + value + b"\r\nconnection: close\r\n\r\n"
    )
    assert raw[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 400")
    head = raw.partition(b"\r\n\r\n")[0].lower()
    assert b"evil" not in head
    assert b"\x00" not in head


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize", "/v1/models", "/nonesuch"])
def test_body_limit(guarded: Running, path: str) -> None:
    """A declared length is refused before the body is read, an undeclared one as soon as it is too long."""
    authorization = f"authorization: Bearer {KEY}"
    with connection(guarded) as sock:
        sock.sendall(request_bytes(path, b"", authorization, f"content-length: {LIMIT + 1}"))
        status, headers, body = read_answer(sock)
        assert (status, headers["connection"]) == (413, "close")
        assert b"body_too_large" in body
        assert read_all(sock) == b""
    with connection(guarded) as sock:
        sock.sendall(request_bytes(path, b"", authorization, "transfer-encoding: chunked"))
        for _ in range(LIMIT // 1024 + 1):
            sock.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert read_answer(sock)[0] == 413


def test_the_limit_itself_is_allowed(guarded: Running, client: httpx.Client) -> None:
    """A body of exactly the limit, whole or in chunks of one byte."""
    text = b'{"prompt": "a"}'
    whole = text + b" " * (LIMIT - len(text))
    headers = {**_bearer(KEY), "content-type": "application/json"}
    assert client.post("/tokenize", content=whole, headers=headers).status_code == 200
    check_error(client.post("/tokenize", content=whole + b" ", headers=headers), 413)
    pieces = (whole[i : i + 1] for i in range(len(whole)))
    assert client.post("/tokenize", content=pieces, headers=headers).status_code == 200
    guarded.wait_idle()


@pytest.mark.parametrize("how", ["content-length: 100", "transfer-encoding: chunked"])
def test_slow_bodies(guarded: Running, how: str) -> None:
    """A body that does not come is a 408, and drops of it do not prolong the time."""
    with connection(guarded) as sock:
        sock.sendall(request_bytes(CHAT, b"", f"authorization: Bearer {KEY}", how))
        started = time.monotonic()
        for _ in range(3):
            sock.sendall(b"1\r\n \r\n" if "chunked" in how else b" ")
            time.sleep(0.1)
        status, headers, body = read_answer(sock)
        assert (status, headers["connection"]) == (408, "close")
        assert b"request_timeout" in body
        assert time.monotonic() - started < 3
    guarded.wait_idle()


@pytest.mark.parametrize("start", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nhost: x\r\nx: ", b"\r\n\r\n"])
def test_slow_heads(guarded: Running, start: bytes) -> None:
    """Slowloris: a connection whose request does not come is closed, though drops of it do."""
    with connection(guarded) as sock:
        started = time.monotonic()
        sock.sendall(start)
        time.sleep(0.2)
        if start:
            sock.sendall(start[-1:])
        assert read_all(sock) == b""
        assert time.monotonic() - started < 3


def test_an_idle_connection_is_kept(guarded: Running) -> None:
    """The limit on heads is none on the time between two requests."""
    with connection(guarded) as sock:
        for _ in range(2):
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_answer(sock)[0] == 200
            time.sleep(0.8)


def test_content_types(client: httpx.Client) -> None:
    """JSON only: forms and plain text are what foreign web pages can send without asking."""
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        headers = {**_bearer(KEY), "content-type": kind}
        assert client.post("/tokenize", content=b'{"prompt": "a"}', headers=headers).status_code == 200
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json5"):
        headers = {**_bearer(KEY), "content-type": kind}
        for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
            check_error(client.post(path, content=b"{}", headers=headers), 415, "content-type")


def test_no_foreign_origin_is_let_in(client: httpx.Client) -> None:
    """No CORS headers: a web page cannot read answers, nor ask beforehand."""
    headers = {**_bearer(KEY), "origin": "http://evil.example", "access-control-request-method": "POST"}
    response = client.options(CHAT, headers=headers)
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)


def test_other_methods(client: httpx.Client) -> None:
    """405 in the usual shape, with the methods that exist; TRACE sends nothing back."""
    for path, method, allowed in ((CHAT, "GET", "POST"), ("/v1/models", "POST", "GET"), (TEXT, "TRACE", "POST")):
        response = client.request(method, path, headers=_bearer(KEY))
        check_error(response, 405)
        assert response.headers["allow"] == allowed
        assert KEY not in response.text
    head = client.head(CHAT, headers=_bearer(KEY))
    assert (head.status_code, head.content) == (405, b"")


def test_websockets(guarded: Running) -> None:
    """There are none: an upgrade is an ordinary request, guarded like any other."""
    upgrade = "GET {} HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
    upgrade += "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    for path, status in (("/v1/realtime", 401), (CHAT, 401), ("/health", 200)):
        with connection(guarded) as sock:
            sock.sendall(upgrade.format(path).encode())
            assert read_answer(sock)[0] == status


def test_duplicate_authorization(client: httpx.Client) -> None:
    """The first one counts: a second one cannot be smuggled in behind a wrong one."""
    pair = [("authorization", "Bearer wrong"), ("authorization", f"Bearer {KEY}")]
    assert client.get("/v1/models", headers=pair).status_code == 401


def test_without_keys_everything_is_open(server: Running) -> None:
    """No key given, none asked for; and the server lives."""
    with server.client() as open_client:
        assert open_client.get("/v1/models").status_code == 200
        assert "securitySchemes" not in open_client.get("/openapi.json").json()["components"]
        assert open_client.post(CHAT, json=HELLO).status_code == 200
        assert open_client.post(TEXT, json=PROMPT).status_code == 200
    check_alive(server)
