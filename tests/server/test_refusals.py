"""Whatever is wrong with a request's content is a 4xx in OpenAI's shape that names the field; the engine goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_tools import MAX_LEN, Running
from wire import CHAT, HELLO, PROMPT, TEXT, check_alive, check_error

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": 1}, "model"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": "1"}, "n"),
    ({"n": True}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 101}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty"),  # logits over nothing
    ({"min_tokens": 5}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 513}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 40: 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "s" * 257}, "cache_salt"),
    ({"speculation": "on"}, "speculation"),
    ({"speculation": {"cap": -1}}, "speculation.cap"),
    ({"speculation": {"drafters": ["nonesuch"]}}, "speculation.drafters"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": True, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "root :="}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"type": "nonesuch"}}}, "structured_outputs.json"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ({"stream_options": {"nonesuch": True}}, "stream_options.nonesuch"),
    ({"nonesuch": 1}, "nonesuch"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x" * (MAX_LEN + 1)}]}, "messages"),
    ({"messages": HELLO["messages"] * 4097}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 5}, "max_tokens"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"tools": [TOOL] * 2}, "tools"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tools": [{**TOOL, "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"modalities": ["audio"]}, "modalities.0"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]
TEXT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [[]]}, "prompt.0"),
    ({"prompt": [[1], "a"]}, "prompt.1"),
    ({"prompt": [MAX_LEN * 100]}, "prompt"),
    ({"prompt": [1] * MAX_LEN}, "prompt"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
]
CASES = [
    *((CHAT, HELLO, *case) for case in BOTH + CHAT_ONLY),
    *((TEXT, PROMPT, *case) for case in BOTH + TEXT_ONLY),
]


def _name(case: tuple[str, Any, Any, str]) -> str:
    return f"{case[0].split('/')[2]} {json.dumps(case[2])[:50]}"


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_the_field_is_named(client: httpx.Client, case: tuple[str, Any, Any, str]) -> None:
    """Out of range, of the wrong type, contradictory, unknown: also where the answer would have been a stream."""
    path, good, change, param = case
    for stream in (False, True):
        check_error(client.post(path, json={**good, **change, "stream": stream}), 400, param)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_unknown_model(server: Running, path: str) -> None:
    """404, and the message does not repeat what the client sent."""
    body = {**(HELLO if path == CHAT else PROMPT), "model": "nonesuch"}
    message = check_error(server.post(path, body), 404, "model", "model_not_found")
    assert "nonesuch" not in message
    assert "tiny" in message


BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"1",
    b'"x"',
    b"\xff\xfe",
    b"\x00",
    b"{'messages': 1}",
    b'{"messages": [}',
    b'{"prompt": "a"} trailing',
    b'{"prompt": NaN}',
    b'{"prompt": "\\ud800"}',
    b"{" * 100_000,
    "{}".encode("utf-16"),
    b"\xef\xbb\xbf{}",
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content[:16]))
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_malformed_bodies(client: httpx.Client, path: str, content: bytes) -> None:
    """What is no JSON, or no object, is refused on every route that takes a body."""
    check_error(client.post(path, content=content, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_prompt_too_long_says_how_long_it_may_be(server: Running, path: str) -> None:
    """OpenAI's code, so that clients can shorten the prompt."""
    text = "x" * MAX_LEN
    body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    message = check_error(server.post(path, body), 400, code="context_length_exceeded")
    assert str(MAX_LEN) in message


def test_tokenize_and_detokenize(server: Running) -> None:
    """The small routes name the field too."""
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": HELLO["messages"]}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": "a", "chat_template": "x"}, "chat_template"),
    ):
        check_error(server.post("/tokenize", body), 400, param)
    for tokens, param in (([-1], "tokens.0"), ([10**6], "tokens"), ([2**31], "tokens.0"), ("a", "tokens")):
        check_error(server.post("/detokenize", {"tokens": tokens}), 400, param)
    check_error(server.post("/detokenize", {"tokens": [], "model": "nonesuch"}), 404, "model")


def test_what_was_sent_is_not_echoed(server: Running) -> None:
    """Values never come back in an error, so that logs and pages that show errors hold no prompts."""
    secret = "correct horse battery"
    for body in ({**HELLO, "temperature": secret}, {**HELLO, "messages": [{"role": secret, "content": secret}]}):
        assert secret not in server.post(CHAT, body).text
    assert secret not in server.post(TEXT, {"prompt": [secret, 1]}).text


def test_the_engine_lives(server: Running) -> None:
    """After all of the above."""
    check_alive(server)
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
    server.wait_idle()


@pytest.mark.parametrize(
    ("path", "extra", "param", "part"),
    [
        (TEXT, {"stop": ["a"] * 17}, "stop", "at most 16"),
        (TEXT, {"prompt": ["a"] * 257}, "prompt", "at most 256"),
        (TEXT, {"prompt": []}, "prompt", "at least 1"),
        (TEXT, {"prompt": ["a", ["b"]]}, "prompt.1", "string"),
        (TEXT, {"speculation": "on"}, "speculation", '"off"'),
        (TEXT, {"suffix": "x"}, "suffix", "filled in"),
        (CHAT, {"bad_words": ["x"]}, "bad_words", "logit_bias"),
        (CHAT, {"lora_request": {}}, "lora_request", "LoRA"),
        (CHAT, {"skip_special_tokens": False}, "skip_special_tokens", "return_token_ids"),
    ],
)
def test_the_message_is_of_the_member_that_fits(
    server: Running, path: str, extra: dict[str, Any], param: str, part: str
) -> None:
    base = {"prompt": "a"} if path == TEXT else {"messages": [{"role": "user", "content": "a"}]}
    error = server.post(path, {**base, **extra}).json()["error"]
    assert error["param"] == param
    assert part in error["message"]
