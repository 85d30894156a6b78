"""Requests of `server_soak.py`: every option in turn, and the clients that send them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from dataclasses import dataclass, field
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}},
    },
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"n": 3},
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    {"stop": ["e", "\n\n"]},
    {"presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"logit_bias": {"1": -5}},
    {"speculation": "off"},
    {"speculation": {"cap": 2, "metrics": True}},
    {"structured_outputs": {"regex": "[a-z ]{20,60}"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}},
    {"cache_salt": "tenant"},
    {"return_token_ids": True, "seed": 7},
)
_CHAT_OPTIONS: tuple[dict[str, Any], ...] = (
    {"logprobs": True, "top_logprobs": 3},
    {"tools": [_TOOL]},
    {"tools": [_TOOL], "tool_choice": "required"},
    {"prediction": {"type": "content", "content": "the quick brown fox jumps over the lazy dog " * 3}},
)
_TEXT_OPTIONS: tuple[dict[str, Any], ...] = (
    {"logprobs": 3},
    {"echo": True, "logprobs": 1},
    {"prediction": "the quick brown fox " * 5},
    {"prompt": ["a", "b b b", "c"]},
)


@dataclass(slots=True)
class Outcome:
    """How many requests there were, and how they ended."""

    sent: int = 0
    completed: int = 0
    aborted: int = 0
    """By their own clients."""
    busy: int = 0
    """Refused with 503."""
    too_long: int = 0
    """Refused with 400: prompts with tools, where the tokenizer is a byte's."""
    faults: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of completed requests."""


def make(rng: random.Random, max_tokens: int) -> tuple[str, dict[str, Any]]:
    """A random request."""
    words = " ".join(rng.choices(("river", "stone", "cloud", "tree", "sun", "wind"), k=rng.randrange(2, 20)))
    limit = rng.randrange(1, max_tokens)
    stream = rng.random() < 0.6
    common = {"max_tokens": limit, "stream": stream, "ignore_eos": rng.random() < 0.5}
    if stream:
        common["stream_options"] = {"include_usage": True}
    if rng.random() < 0.6:
        messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": words}]
        return CHAT, {"messages": messages, **common, **rng.choice(OPTIONS + _CHAT_OPTIONS)}
    return TEXT, {"prompt": f"Once upon a time, {words}", **common, **rng.choice(OPTIONS + _TEXT_OPTIONS)}


@dataclass(frozen=True, slots=True)
class Client:
    """How one client behaves.

    Args:
        leaves: seconds after which it goes away; None: it stays.
        pause: seconds between two reads.
    """

    leaves: float | None
    pause: float


def client(rng: random.Random, aborts: float) -> Client:
    """A share of `aborts` leaves at a random time, a tenth reads slowly."""
    leaves = rng.choice((0.0, rng.random() * 0.2, rng.random() * 3)) if rng.random() < aborts else None
    return Client(leaves, rng.random() * 0.1 if rng.random() < 0.1 else 0.0)


async def talk(host: str, port: int, path: str, body: dict[str, Any], how: Client) -> tuple[int, bytes]:
    """Send one request; status and body of the answer, (0, b"") where the client left."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 16)
    answer = bytearray()
    try:
        async with asyncio.timeout(how.leaves):
            writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            await writer.drain()
            while piece := await reader.read(512 if how.pause else 65536):
                answer += piece
                if how.pause:
                    await asyncio.sleep(how.pause)
    except TimeoutError:
        return 0, b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    start, _, rest = bytes(answer).partition(b"\r\n\r\n")
    return int(start.split(b" ")[1]) if start else -1, rest


def judge(outcome: Outcome, body: dict[str, Any], status: int, answer: bytes) -> None:
    """Count how a request ended; an accepted one must be complete."""
    if status == 0:
        outcome.aborted += 1
    elif status == 503:
        outcome.busy += 1
    elif status == 400 and b"context_length_exceeded" in answer:
        outcome.too_long += 1
    elif status == 200 and (b"data: [DONE]" in answer if body["stream"] else b'"usage":' in answer):
        outcome.completed += 1
        found = answer.rpartition(b'"completion_tokens":')[2]
        digits = found[:8].split(b",")[0]
        outcome.tokens += int(digits) if digits.isdigit() else 0
        if body["stream"] and b'"error":{"message"' in answer:
            outcome.faults.append(f"error in a stream: {body} {answer[-300:]!r}")
    else:
        outcome.faults.append(f"{status}: {body} {answer[-300:]!r}")
