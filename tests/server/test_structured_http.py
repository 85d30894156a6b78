"""Structured output and tool calls over HTTP: what comes back is valid, whatever drafts and however it is sampled."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server_tools import END, Running, events, make_byte_loaded, serving

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["the cat", "the hat"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} "
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>' + END + "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}}}
    for name, properties in (("weather", WEATHER), ("stop_now", {}))
]  # fmt: skip
SPECULATION = ("none", "auto", "grammar:k=8", "ngram:k=4+grammar:k=8", "recycling:k=8")


@pytest.fixture(scope="module", params=SPECULATION)
def drafting(request: pytest.FixtureRequest) -> Iterator[Running]:
    loaded = make_byte_loaded(template=TOOL_TEMPLATE, max_position_embeddings=2048)
    with serving(loaded, engine={"speculation": request.param}) as running:
        yield running


def ask(running: Running, **extra: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 400, **extra}
    answer = running.post(CHAT, body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_a_schema_holds_under_every_drafter(drafting: Running, temperature: float) -> None:
    answer = ask(drafting, response_format=FORMAT, temperature=temperature, seed=1, n=3)
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        thing = json.loads(choice["message"]["content"])
        assert set(thing) == set(SCHEMA["properties"])  # type: ignore[arg-type]
        assert 0 <= thing["age"] <= 120
        assert thing["kind"] in ("the cat", "the hat")


def test_every_kind(drafting: Running) -> None:
    for kind, fits in (
        ({"choice": ["red", "green"]}, lambda text: text in ("red", "green")),
        ({"regex": "[0-9]{3}-[a-c]{2}"}, lambda text: re.fullmatch("[0-9]{3}-[a-c]{2}", text)),
        ({"grammar": 'root ::= "a" | "b" root'}, lambda text: re.fullmatch("b*a", text)),
        ({"json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}}, json.loads),
        ({"json": '{"type": "boolean"}'}, lambda text: text in ("true", "false")),
    ):
        text = ask(drafting, structured_outputs=kind)["choices"][0]["message"]["content"]
        assert fits(text), (kind, text)
    answer = ask(drafting, response_format={"type": "json_object"}, max_tokens=1500, temperature=0.5)["choices"][0]
    assert answer["finish_reason"] == "length" or isinstance(json.loads(answer["message"]["content"]), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_is_valid(drafting: Running, choice: Any) -> None:
    answer = ask(drafting, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, n=4, seed=3)
    for sample in answer["choices"]:
        assert sample["finish_reason"] == "tool_calls"
        (call,) = sample["message"]["tool_calls"]
        assert re.fullmatch("call_[0-9a-f]{24}", call["id"])
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weather":
            assert arguments["city"] in ("Oslo", "Rome")
            assert 1 <= arguments["days"] <= 9
        else:
            assert choice == "required"
            assert arguments == {}


def test_streamed_calls_are_the_whole_ones(drafting: Running) -> None:
    body = {"messages": [{"role": "user", "content": "the"}], "tools": TOOLS, "tool_choice": "required", "seed": 4}
    whole = drafting.post(CHAT, body).json()["choices"][0]["message"]["tool_calls"]
    pieces: dict[int, dict[str, str]] = {}
    for chunk in events(drafting.post(CHAT, {**body, "stream": True})):
        for call in chunk["choices"][0]["delta"].get("tool_calls", ()):
            known = pieces.setdefault(call["index"], {"name": "", "arguments": ""})
            known["name"] += call["function"].get("name", "")
            known["arguments"] += call["function"].get("arguments", "")
    assert list(pieces.values()) == [call["function"] for call in whole]


def test_the_law_does_not_depend_on_the_draft(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "the"}], "response_format": FORMAT, "seed": 11, "max_tokens": 400}
    texts = {
        server.post(CHAT, {**body, "speculation": wish}).json()["choices"][0]["message"]["content"]
        for wish in ("off", {"cap": 1}, {"drafters": ["grammar"]}, {"drafters": ["suffix"]}, None)
    }
    assert len(texts) == 1


def test_forced_tokens_are_accepted_always(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "structured_outputs": {"choice": ["zqxzqxzqx"]}}
    wish = {"drafters": ["grammar"], "metrics": True}
    spec = server.post(CHAT, {**body, "speculation": wish}).json()["metrics"]["speculative_decoding"]
    assert spec["num_draft_tokens"] == spec["num_accepted_draft_tokens"] > 0


def test_tools_without_a_demand_leave_the_text_free(drafting: Running) -> None:
    message = ask(drafting, tools=TOOLS, max_tokens=20, temperature=0)["choices"][0]["message"]
    assert message["content"]
    assert (
        ask(drafting, tools=TOOLS, tool_choice="none", max_tokens=5)["choices"][0]["message"].get("tool_calls") is None
    )


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "zz"}}}, "tool_choice"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": FORMAT}, "tool_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": '{"type": '}}, "structured_outputs.json"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}],
          "tool_choice": "required"}, "tools.0.function.parameters"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(server: Running, extra: dict[str, Any], field: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, **extra}
    answer = server.post(CHAT, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_a_tool_without_parameters_is_called_without_arguments(server: Running) -> None:
    for parameters in ({}, {"parameters": {}}):
        tool = {"type": "function", "function": {"name": "now", **parameters}}
        body = {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "tool_choice": "required"}
        long = make_byte_loaded(max_position_embeddings=2048)
        with serving(long) as running:
            message = running.post(CHAT, {**body, "parallel_tool_calls": False}).json()["choices"][0]["message"]
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {}
    assert server.post(CHAT, {**body, "tool_choice": "none"}).status_code == 200


def test_of_a_call_cut_short_no_markup_is_left(drafting: Running) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "tool_choice": "required", "max_tokens": 3}
    choice = drafting.post(CHAT, body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    streamed = events(drafting.post(CHAT, {**body, "stream": True}))
    assert not "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"type": "string"}, "tools.1.function.parameters"),
        ({"type": "object", "properties": {"x": {"$ref": "#/$defs/no"}}}, "tools.1.function.parameters"),
        ({"type": "object", "properties": {"x": {"multipleOf": 2}}}, "tools.1.function.parameters"),
    ],
)
def test_the_tool_to_blame_is_named(drafting: Running, parameters: dict[str, Any], field: str) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": parameters}}
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [TOOLS[0], bad], "tool_choice": "required"}
    answer = drafting.post(CHAT, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_a_known_grammar_does_not_wait_for_a_new_one(server: Running) -> None:
    known = {"messages": [{"role": "user", "content": "a"}], "structured_outputs": {"choice": ["yes", "no"]}}
    assert server.post(CHAT, known).status_code == 200
    gate = threading.Event()
    compile_one = server.service.grammars.constraint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.service.grammars, "constraint", lambda *a: (gate.wait(30), compile_one(*a))[1])
        with ThreadPoolExecutor(40) as pool:
            new = [
                pool.submit(server.post, CHAT, {**known, "structured_outputs": {"regex": f"a{i}"}}) for i in range(20)
            ]
            while sum(future.done() for future in new) < 4:
                time.sleep(0.01)
            assert server.post(CHAT, known).status_code == 200
            gate.set()
            codes = sorted(future.result().status_code for future in new)
    assert codes == [200] * 16 + [503] * 4, "16 may wait; the others are told to come again"
