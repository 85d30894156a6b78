"""A stream, put together, is the whole answer: the same text, calls, reasoning, log-probabilities and counts, whatever
options the request has. Only httpx is used, and chunks are put together as OpenAI's documentation says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server_tools import TEMPLATE, Running, events, make_byte_loaded, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say something about the sea, in three words or more."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["Łódź", "東京", 'a "b"']}, "days": {"enum": [1, 23, -4]}},
                "required": ["place", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("now", "tides")
]
CALL = '<tool_call>\n{"name": "tides", "arguments": {"place": "東京", "days": 1}}\n</tool_call>'
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "seed": 6},
    "seeded": {"temperature": 1, "seed": 7},
    "three samples": {"n": 3, "seed": 8},
    "log-probabilities": {"seed": 9, "logprobs": 3},
    "samples with log-probabilities": {"n": 2, "seed": 10, "logprobs": 0},
    "filters": {"seed": 11, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {
        "temperature": 0,
        "seed": 6,
        "frequency_penalty": 1.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
    },
    "bias": {"seed": 12, "logit_bias": {"70": 4, "71": 4, "199": 5}},
    "no end": {"seed": 13, "ignore_eos": True, "min_tokens": 10},
    "no speculation": {"seed": 14, "speculation": "off", "logprobs": 1},
    "short drafts": {"seed": 15, "speculation": {"cap": 1, "metrics": True}},
    "token ids": {"seed": 16, "n": 2, "return_token_ids": True},
    "one token": {"seed": 17, "logprobs": 2, "max_tokens": 1},
    "split characters": {
        "seed": 18,
        "logprobs": 1,
        "structured_outputs": {"regex": "(é|€|😀|한|🇪🇺){5}"},
        "max_tokens": 40,
    },
    "choice": {"seed": 19, "n": 2, "structured_outputs": {"choice": ["naïve", "naïveté", "😀😃"]}},
    "text and a call, unread": {"seed": 20, "structured_outputs": {"choice": [f"Hm {CALL}"]}},
    "JSON": {"seed": 21, "n": 2, "response_format": {"type": "json_object"}, "max_tokens": 30},
}
CALLS: dict[str, dict[str, Any]] = {
    "a demanded call": {"seed": 31, "tool_choice": "required", "parallel_tool_calls": False},
    "demanded calls": {"seed": 32, "tool_choice": "required", "n": 2, "max_tokens": 70},
    "a cut call": {"seed": 33, "tool_choice": "required", "max_tokens": 40},
    "a named call": {"seed": 34, "tool_choice": {"type": "function", "function": {"name": "tides"}}},
    "text, then a call": {"seed": 35, "structured_outputs": {"choice": [f"Let me see. {CALL}", CALL]}, "n": 2},
    "a call, then text": {"seed": 36, "structured_outputs": {"choice": [f"{CALL} So."]}},
    "two calls": {"seed": 37, "max_tokens": 200, "structured_outputs": {"choice": [CALL + CALL]}, "logprobs": 1},
    "nearly a call": {"seed": 38, "structured_outputs": {"choice": ["a < b <tool_call", '<tool_call>{"name": 1}']}},
    "an unknown function": {"seed": 39, "structured_outputs": {"choice": [CALL.replace("tides", "tidy")]}},
    "calls in random text": {"seed": 40, "tool_choice": "auto", "n": 2, "max_tokens": 12},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with room for the description of tools."""
    with serving(make_byte_loaded(max_position_embeddings=2048)) as running:
        yield running


def chat_body(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A chat request; `logprobs: N` is written as chat completions want it."""
    body = {"messages": MESSAGES, "max_completion_tokens": options.get("max_tokens", 16), **options, **more}
    body.pop("max_tokens", None)
    if isinstance(number := body.get("logprobs"), int):
        body |= {"logprobs": True, "top_logprobs": number}
    return body


def text_body(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A text request."""
    return {"prompt": "the sea €", "max_tokens": 16, **options, **more}


def whole(server: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer in one piece."""
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    return comparable(response.json())


def streamed(server: Running, path: str, body: dict[str, Any], **stream_options: bool) -> dict[str, Any]:
    """The same answer from a stream."""
    stream_options = {"include_usage": True, **stream_options}
    response = server.post(path, {**body, "stream": True, "stream_options": stream_options})
    assert response.status_code == 200, response.text
    return comparable(put_together(events(response)))


def put_together(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole answer of a stream's chunks."""
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    answer: dict[str, Any] = {"object": chunks[0]["object"].removesuffix(".chunk"), "choices": {}}
    for chunk in chunks:
        for name in chunk.keys() - {"choices", "object"}:
            if chunk[name] is not None:
                answer[name] = chunk[name]
        for piece in chunk["choices"]:
            add_piece(answer["choices"].setdefault(piece["index"], {"index": piece["index"]}), piece)
    answer["choices"] = [choice for _, choice in sorted(answer["choices"].items())]
    return answer


def add_piece(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    """Add a chunk's piece to its choice."""
    assert choice.get("finish_reason") is None, "a piece after the last one"
    choice["finish_reason"] = piece["finish_reason"]
    for name in ("token_ids", "prompt_token_ids"):
        if name in piece:
            choice[name] = choice.get(name, []) + piece[name]
    if "text" in piece:
        choice["text"] = choice.get("text", "") + piece["text"]
    else:
        add_delta(choice.setdefault("message", {"content": None, "refusal": None}), piece["delta"])
    kept = choice.setdefault("logprobs", None)
    if piece["logprobs"] is not None:
        kept = choice["logprobs"] = kept or {}
        for name, values in piece["logprobs"].items():
            kept[name] = None if values is None else (kept.get(name) or []) + values


def add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a delta to its message."""
    if "role" in delta:
        assert set(message) == {"content", "refusal"}, "the role comes first"
        message["role"] = delta["role"]
    for name in ("content", "reasoning_content"):
        if name in delta:
            message[name] = (message.get(name) or "") + delta[name]
    calls = message.setdefault("tool_calls", []) if "tool_calls" in delta else []
    for call in delta.get("tool_calls", []):
        if call["index"] == len(calls):
            calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
        else:
            assert "id" not in call
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run: ids, times, counts of what happened inside, and the last digits of
    log-probabilities, which depend on how many tokens a step looked at."""
    for name in ("id", "created", "metrics"):
        answer.pop(name, None)
    answer["usage"].pop("prompt_tokens_details")
    details = answer["usage"].pop("completion_tokens_details")
    answer["usage"]["reasoning_tokens"] = details["reasoning_tokens"]
    for choice in answer["choices"]:
        message = choice.get("message", {})
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None  # a stream begins with "" before it knows
        for call in message.get("tool_calls", []):
            assert call.pop("id").startswith("call_")
    return rounded(answer)


def rounded(value: Any) -> Any:
    """Numbers that are compared up to rounding."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize("name", OPTIONS)
def test_chat(server: Running, name: str) -> None:
    body = chat_body(OPTIONS[name])
    answer = whole(server, CHAT, body)
    assert streamed(server, CHAT, body) == answer
    assert all(choice["message"]["content"] for choice in answer["choices"])


@pytest.mark.parametrize("name", ["seeded", "three samples", "log-probabilities", "token ids", "split characters"])
def test_text(server: Running, name: str) -> None:
    body = text_body(OPTIONS[name])
    assert streamed(server, TEXT, body) == whole(server, TEXT, body)


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls(server: Running, name: str) -> None:
    body = chat_body({"max_tokens": 120, **CALLS[name]}, tools=TOOLS)
    answer = whole(server, CHAT, body)
    assert streamed(server, CHAT, body) == answer
    expected = {"two calls": 2, "nearly a call": 0, "an unknown function": 0, "a named call": 1, "a demanded call": 1}
    if name in expected:
        assert [len(c["message"].get("tool_calls", [])) for c in answer["choices"]] == [expected[name]]


@pytest.mark.parametrize(
    "more",
    [
        {"echo": True},
        {"echo": True, "logprobs": 2},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "max_tokens": 0, "return_token_ids": True},
        {"echo": True, "n": 2, "logprobs": 0, "return_token_ids": True},
        {"prompt": ["the sea", "the sky €", "the sea"], "n": 2, "logprobs": 1},
        {"prompt": [[70, 71, 72], [199]], "echo": True, "logprobs": 1},
        {"prompt": [70, 71, 72], "prediction": "the sea and the sky"},
    ],
    ids=lambda more: ", ".join(more),
)
def test_text_options(server: Running, more: dict[str, Any]) -> None:
    body = text_body({"seed": 51}, **more)
    assert streamed(server, TEXT, body) == whole(server, TEXT, body)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_stop_strings_wherever_they_fall(server: Running, path: str) -> None:
    forced = {"structured_outputs": {"choice": ["one € two 😀 three the ing four"]}, "seed": 3, "max_tokens": 60}
    make = chat_body if path == CHAT else text_body
    for stop in ("e €", " 😀", "😀", "wo", "hree th", ["zzz", "ing", "the in"], "our", "nothing of it", "€ two 😁"):
        body = make({**forced, "stop": stop, "logprobs": 0})
        answer = whole(server, path, body)
        assert streamed(server, path, body) == answer
        choice = answer["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert not any(item in text for item in ([stop] if isinstance(stop, str) else stop))
        assert choice["finish_reason"] == "stop"


def test_usage_with_every_chunk(server: Running) -> None:
    body = chat_body({"seed": 61, "n": 2})
    assert streamed(server, CHAT, body, continuous_usage_stats=True) == whole(server, CHAT, body)
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(server.post(CHAT, {**body, **options}))]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_no_usage_unless_asked_for(server: Running) -> None:
    chunks = events(server.post(CHAT, {**chat_body({"seed": 62}), "stream": True}))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    [first, *others] = chunks
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in others)


@pytest.fixture(scope="module")
def thinker() -> Iterator[tuple[Running, int]]:
    """A server whose chat template opens the model's reasoning, and the token that closes it."""
    template = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    loaded = make_byte_loaded(template=template, max_position_embeddings=2048)
    loaded.tokenizer.add_tokens(["</think>"])
    with serving(loaded) as running:
        yield running, loaded.tokenizer.convert_tokens_to_ids("</think>")


@pytest.mark.parametrize(
    ("bias", "tools"),
    [(-100, []), (3, []), (3, TOOLS), (100, TOOLS)],
    ids=["never ends", "ends", "ends, with tools", "is empty"],
)
def test_reasoning(thinker: tuple[Running, int], bias: int, tools: list[Any]) -> None:
    server, end = thinker
    body = chat_body({"seed": 71, "n": 3, "logprobs": 1}, logit_bias={str(end): bias}, tools=tools)
    answer = whole(server, CHAT, body)
    assert streamed(server, CHAT, body) == answer
    thoughts = [choice["message"].get("reasoning_content") for choice in answer["choices"]]
    assert all(thoughts) if bias < 0 else any(thoughts) == (bias < 100)
    assert (answer["usage"]["reasoning_tokens"] > 0) == any(thoughts)
