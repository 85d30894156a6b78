"""Random requests for `server_fuzz.py`: valid ones, bodies with something wrong in them, and what is no HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BODIES: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True, "n": 2},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "tools": [TOOL], "tool_choice": "auto"},
    ],
    TEXT: [
        {"prompt": "hi", "max_tokens": 2},
        {"prompt": [1, 2, 3], "max_tokens": 2, "logprobs": 2, "echo": True, "seed": 1},
        {"prompt": ["a", "b"], "max_tokens": 2, "stop": ["x"], "temperature": 0, "stream": True},
    ],
    "/tokenize": [{"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}], "return_token_strs": True}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
# fmt: off
FIELDS = (
    "model", "messages", "prompt", "n", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "stop_token_ids", "logit_bias", "logprobs", "top_logprobs",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "stream", "stream_options", "structured_outputs",
    "response_format", "tools", "tool_choice", "parallel_tool_calls", "cache_salt", "echo", "suffix", "best_of",
    "speculation", "prediction", "chat_template_kwargs", "chat_template", "return_token_ids", "metadata", "user",
    "tokens", "add_special_tokens", "continue_final_message", "reasoning_effort", "ignore_eos", "prompt_embeds",
    "nonesuch",
)
# fmt: on
ROUTES = (
    *BODIES,
    "/v1/models",
    "/v1/models/x",
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/openapi.json",
    "/",
    "/x",
)
METHODS = ("GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "POST", "CONNECT", "get", "X" * 40)
STRANGE_HEADERS = (
    "content-length: -1",
    "content-length: 1e3",
    "content-length: 99999999999999999999",
    "content-length: 0",
    "transfer-encoding: chunked",
    "transfer-encoding: gzip",
    "transfer-encoding: chunked, chunked",
    "expect: 100-continue",
    "expect: nonsense",
    "upgrade: websocket",
    "connection: upgrade, keep-alive",
    "content-type: text/plain",
    "content-type: application/json; charset=\x7f",
    "content-encoding: gzip",
    "authorization: Bearer \xff",
    "x-request-id: a b\tc",
    "x-request-id: " + "x" * 300,
    "range: bytes=0-1",
    "host: ",
    "host: a:b:c",
    "cookie: " + "a=b; " * 200,
    "accept-encoding: " + "," * 500,
    "x: " + "y" * 9000,
    "bad header",
    ": nameless",
    " folded: x",
)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Bytes for one connection.

    Args:
        kind: for the table.
        data: what is sent.
        answered: whether an answer must come.
        leaves: seconds after which the client goes away; None waits for the end of the answer.
    """

    kind: str
    data: bytes
    answered: bool = False
    leaves: float | None = None


def strange_value(rng: random.Random, depth: int = 0) -> Any:
    """Something that no field expects."""
    numbers = (0, -1, 1, 2, 3, 17, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 5e-324, float("nan"))
    texts = ("", "x", "\x00", "é", "😀", "\u202e", "x" * 600, "a" * 20_000, "{{ 1 }}", "(a+)+", "root ::= root", "off")
    choices: list[Callable[[], Any]] = [
        lambda: rng.choice(numbers),
        lambda: rng.choice(texts),
        lambda: rng.choice((None, True, False)),
        lambda: [strange_value(rng, depth + 1) for _ in range(rng.randrange(4))],
        lambda: {
            rng.choice((*FIELDS, "type", "1", "\n")): strange_value(rng, depth + 1) for _ in range(rng.randrange(4))
        },
        lambda: [rng.randrange(-2, 600)] * rng.choice((1, 10, 1000)),
        lambda: rng.choice(
            ({"regex": "a{1,9}"}, {"json": {"$ref": "#"}}, {"choice": ["a", "b"]}, {"grammar": "root ::="})
        ),
        lambda: {"type": rng.choice(("json_object", "json_schema", "text", "function", "content"))},
    ]
    return rng.choice(choices[:3] if depth > 3 else choices)()


def _mutate(rng: random.Random, body: Any, depth: int = 0) -> Any:
    """Change one place of a body."""
    if depth < 4 and isinstance(body, dict) and body and rng.random() < 0.7:
        key = rng.choice(list(body))
        return {**body, key: _mutate(rng, body[key], depth + 1)}
    if depth < 4 and isinstance(body, list) and body and rng.random() < 0.7:
        place = rng.randrange(len(body))
        return [*body[:place], _mutate(rng, body[place], depth + 1), *body[place + 1 :]]
    return strange_value(rng)


def _mutated(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    for _ in range(rng.choice((1, 1, 2, 4))):
        what = rng.random()
        if what < 0.5:
            body = {**body, rng.choice(FIELDS): strange_value(rng)}
        elif what < 0.9 and body:
            key = rng.choice(list(body))
            body = {**body, key: _mutate(rng, body[key])}
        elif body:
            gone = rng.choice(list(body))
            body = {key: value for key, value in body.items() if key != gone}
    return body


def _damage(rng: random.Random, data: bytes) -> bytes:
    """Flip, drop, double and insert bytes."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(damaged) + 1)
        what = rng.randrange(4)
        if what == 0 and at < len(damaged):
            damaged[at] = rng.randrange(256)
        elif what == 1:
            del damaged[at : at + rng.randrange(1, 9)]
        elif what == 2:
            damaged[at:at] = damaged[max(0, at - rng.randrange(1, 20)) : at]
        else:
            damaged[at:at] = rng.choice(
                (b"\r\n", b"\n", b"\x00", b'"', b"{", b"\xff", b",", b"[" * 300, rng.randbytes(4))
            )
    return bytes(damaged)


def request(path: str, body: bytes, headers: tuple[str, ...] = (), method: str = "POST", close: bool = True) -> bytes:
    """A whole request."""
    lines = [f"{method} {path} HTTP/1.1", "host: x", *headers]
    given = {header.partition(":")[0].lower() for header in headers}
    if "content-type" not in given:
        lines.append("content-type: application/json")
    if not given & {"content-length", "transfer-encoding"}:
        lines.append(f"content-length: {len(body)}")
    if close:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _sample(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(list(BODIES))
    return path, rng.choice(BODIES[path])


def _valid(rng: random.Random) -> Attempt:
    path, body = _sample(rng)
    return Attempt("valid", request(path, json.dumps(body).encode()), answered=True)


def _wrong_values(rng: random.Random) -> Attempt:
    path, body = _sample(rng)
    return Attempt("wrong values", request(path, json.dumps(_mutated(rng, body)).encode()), answered=True)


def _damaged_body(rng: random.Random) -> Attempt:
    path, body = _sample(rng)
    return Attempt("damaged body", request(path, _damage(rng, json.dumps(body).encode())), answered=True)


def _random_body(rng: random.Random) -> Attempt:
    return Attempt("random body", request(rng.choice(ROUTES), rng.randbytes(rng.randrange(3000))), answered=True)


def _chunked(rng: random.Random) -> Attempt:
    path, body = _sample(rng)
    content, pieces = json.dumps(body).encode(), b""
    while content:
        size = rng.randrange(1, 20)
        pieces += b"%x\r\n%s\r\n" % (len(content[:size]), content[:size])
        content = content[size:]
    return Attempt("chunked", request(path, pieces + b"0\r\n\r\n", ("transfer-encoding: chunked",)), answered=True)


def _broken_http(rng: random.Random) -> Attempt:
    path, body = _sample(rng)
    data = request(path, json.dumps(body).encode())
    end = data.index(b"\r\n\r\n") + 4
    return Attempt("broken HTTP", _damage(rng, data[:end]) + data[end:], leaves=0.1)


def _noise(rng: random.Random) -> Attempt:
    return Attempt("noise", rng.randbytes(rng.randrange(1, 400)), leaves=0.05)


def _truncated(rng: random.Random) -> Attempt:
    path, body = _sample(rng)
    data = request(path, json.dumps(body).encode())
    return Attempt("truncated", data[: rng.randrange(len(data))], leaves=rng.choice((0.0, 0.0, 0.02)))


def _odd_headers(rng: random.Random) -> Attempt:
    path, body = _sample(rng)
    headers = tuple(rng.sample(STRANGE_HEADERS, rng.randrange(1, 4)))
    return Attempt("odd headers", request(path, json.dumps(body).encode(), headers), leaves=0.3)


def _other_methods(rng: random.Random) -> Attempt:
    path = rng.choice(ROUTES) + rng.choice(("", "/", "?a=b", "?" + "x" * 2000, "%00", "/../x", "%f0%9f"))
    return Attempt("methods and paths", request(path, b"", method=rng.choice(METHODS)), leaves=1.0)


def _pipelined(rng: random.Random) -> Attempt:
    parts = []
    count = rng.randrange(2, 6)
    for i in range(count):
        path, body = _sample(rng)
        body = _mutated(rng, body) if rng.random() < 0.5 else body
        parts.append(request(path, json.dumps(body).encode(), close=i == count - 1))
    return Attempt("pipelined", b"".join(parts), answered=True)


def _early_close(rng: random.Random) -> Attempt:
    path, body = _sample(rng)
    if path in (CHAT, TEXT):
        body = {**body, "max_tokens": 40, "ignore_eos": True, "n": rng.choice((1, 3))}
    return Attempt("early close", request(path, json.dumps(body).encode()), leaves=rng.choice((0.0, 0.005, 0.03)))


KINDS: dict[Callable[[random.Random], Attempt], int] = {
    _valid: 6,
    _wrong_values: 34,
    _damaged_body: 14,
    _random_body: 6,
    _chunked: 3,
    _broken_http: 8,
    _noise: 4,
    _truncated: 8,
    _odd_headers: 5,
    _other_methods: 6,
    _pipelined: 2,
    _early_close: 4,
}


def attempt(seed: int, number: int) -> Attempt:
    """The attempt of that number, the same for the same seed."""
    rng = random.Random(f"{seed}:{number}")
    return rng.choices(list(KINDS), list(KINDS.values()))[0](rng)
