"""Parsers under random and hostile text: nothing is lost, time is linear, nothing recurses."""

from __future__ import annotations

import ast
import json
import random
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
from test_parsers import CALLS, NOT_CALLS, REASONED, parser, streamed

from paceline.server.parsers.base import OutputParser, ParsedMessage, collect, parse
from paceline.server.parsers.registry import tool_parser_names


def random_value(rng: random.Random, depth: int = 4) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {random_text(rng): random_value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return [None, True, rng.randrange(-999, 999), rng.uniform(-1e9, 1e9), random_text(rng), False][kind]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices("abc \"'\\\n\t{}[]<>/é😀\x00\x7f,:", k=rng.randrange(8)))


@pytest.mark.parametrize("seed", range(20))
def test_random_arguments_survive(seed: int) -> None:
    rng = random.Random(seed)
    value = {"a": random_value(rng), "b": random_value(rng)}
    plain = json.dumps(value, ensure_ascii=bool(seed % 2), indent=seed % 3 or None)
    texts = {
        "hermes": f'<tool_call>{{"name": "now", "arguments": {plain}}}</tool_call>',
        "granite": f'<|tool_call|>[{{"arguments": {json.dumps(plain)}, "name": "now"}}]',
        "mistral": f"[TOOL_CALLS]now[ARGS]{plain}",
        "pythonic": f"[now(a={value['a']!r}, b={value['b']!r})]",
    }
    for tool, text in texts.items():
        for pieces in ([text], list(text)):
            (call,) = collect(streamed(lambda tool=tool: parser(tool), pieces)).tool_calls
            assert json.loads(call.arguments) == value, tool


def test_python_literals_mean_what_python_says() -> None:
    for literal in [
        "'\\t\\x7f'",
        '"\\u20ac\\\\"',
        "'''a'b''c'''",
        "-.5",
        "1.",
        "1_000",
        "0x1F",
        "+3",
        "(1, 2)",
        "{'a': ()}",
    ]:
        (call,) = parse(parser("pythonic"), f"[now(a={literal})]").tool_calls
        expected = json.loads(json.dumps(ast.literal_eval(literal)))
        assert json.loads(call.arguments) == {"a": expected}, literal


def fragments() -> list[str]:
    """Pieces of all formats' markup, to make nonsense of."""
    texts = [text for _, text, *_ in [*CALLS, *NOT_CALLS]] + [text for _, _, text, *_ in REASONED]
    found = {piece for text in texts for piece in re.findall(r"<[^>]*>|\[[A-Z_]+\]|\w+|\s+|[^\w\s]", text)}
    return sorted(found)


@pytest.mark.parametrize("tool", tool_parser_names())
def test_nonsense(tool: str) -> None:
    """Any text: the same events for every split, nothing lost, nothing invented."""
    rng = random.Random(7)
    pieces = fragments()
    cases = [text for name, text, *_ in CALLS if name == tool]
    for round_ in range(40):
        if round_ % 2:
            text = "".join(rng.choices(pieces, k=rng.randrange(1, 12)))
        else:
            base = rng.choice(cases)
            at = rng.randrange(len(base))
            text = base[:at] + rng.choice([*pieces, "", '"', "\\", "}"]) + base[at + rng.randrange(3) :]
        message = collect(streamed(lambda: parser(tool), [text]))
        for chunks in (list(text), [text[: len(text) // 2], text[len(text) // 2 :]]):
            assert collect(streamed(lambda: parser(tool), chunks)) == message, text
        content = message.content or ""
        if not message.tool_calls:
            assert content == text
        rest = iter(text)
        assert all(char in rest for char in content), "content is what is left of the text, in order"
        assert all(call.name in ("now", "get_weather") for call in message.tool_calls)


def seconds(running: OutputParser, pieces: Iterable[str]) -> float:
    start = time.process_time()
    for piece in pieces:
        running.push(piece)
    running.finish()
    return time.process_time() - start


@pytest.mark.parametrize("unit", ["<tool_call>", '<tool_call>{"name":'])
def test_a_megabyte_by_characters(unit: str) -> None:
    """About 2 s where it was written; a second scan of held text would take hours."""
    assert seconds(parser("hermes"), unit * (1_000_000 // len(unit))) < 12


@pytest.mark.parametrize(
    ("tool", "head", "unit"),
    [
        ("hermes", "", "<tool_call>["),
        ("hermes", "", '<tool_call>{"arguments":'),
        ("hermes", '<tool_call>{"arguments":"', "\\u0041"),
        ("hermes", '<tool_call>{"name":"now","arguments":{"a":"', "<tool_call>"),
        ("hermes", '<tool_call>{"name":"now","arguments":{"a":[', "1,"),
        ("hermes", "", "\n"),
        ("llama3_json", "", '{"name":'),
        ("llama3_json", '{"parameters":[', "{},"),
        ("mistral", "", "[TOOL_CALLS]now[ARGS]{"),
        ("granite", "", "<|tool_call|>[{"),
        ("pythonic", "[now(a=[", "'x',"),
        ("pythonic", "[", "now("),
        ("pythonic", "[now(a=", "-"),
        ("qwen3_coder", "", "<tool_call><function=now><parameter=a>"),
        ("qwen3_coder", "<function=now><parameter=a>", "\n"),
        ("deepseek_v3", "", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>"),
    ],
)
def test_hostile_text_takes_linear_time(tool: str, head: str, unit: str) -> None:
    text = head + unit * (50_000 // len(unit))
    assert seconds(parser(tool, "think"), text) < 3
    assert seconds(parser(tool, "think"), [text]) < 3


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_no_call(opening: str) -> None:
    deep = opening * 100_000
    for text in (
        f'<tool_call>{{"arguments": {deep}',
        f'<tool_call>{{"name": "now", "arguments": {json.dumps(deep)}}}</tool_call>',
        f'<tool_call>{{"x": {deep}',
    ):
        assert parse(parser("hermes"), text) == ParsedMessage(text, None, ())
    (call,) = parse(parser("hermes"), f'<tool_call>{{"name": "now", "arguments": {{"a": {deep}').tool_calls
    assert len(call.arguments) < 1000
    (call,) = parse(parser("pythonic"), f"[now(a={'[' * 100_000}").tool_calls
    assert len(call.arguments) < 1000


def test_no_lone_surrogates() -> None:
    """A client must be able to encode what it gets as UTF-8."""
    for tool, text in [
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\\\ud800\\"}"}'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\ud800\\"}"}'),
        ("pythonic", "[now(a='\\ud800')]"),
    ]:
        (call,) = parse(parser(tool), text).tool_calls
        call.arguments.encode()
        assert json.loads(call.arguments) == {"a": "\ud800"}
