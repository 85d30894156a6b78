"""Parsers of generated text: every format, every split, and hostile text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import pytest

from paceline.server.parsers.base import (
    ContentDelta,
    Event,
    OutputParser,
    ParsedMessage,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    collect,
    new_call_id,
    parse,
)
from paceline.server.parsers.registry import create, reasoning_parser_names, tool_parser_names

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "n": {"type": "integer"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "maybe": {"type": ["string", "null"]},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
Call = tuple[str, str]

CALLS: list[tuple[str, str, str | None, list[Call]]] = [
    # hermes
    (
        "hermes",
        'Hm.\n<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>',
        "Hm.\n",
        [("now", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": [1, {}]}, "name": "now"}</tool_call>',
        None,
        [("now", '{"a": [1, {}]}')],
    ),
    (
        "hermes",
        '\n\n<tool_call>\n{"name": "now"}\n</tool_call>\n<tool_call>\n'
        '{"name": "get_weather", "arguments": {"n": -1.5e3}}\n</tool_call>\n',
        None,
        [("now", "{}"), ("get_weather", '{"n": -1.5e3}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"é\\"}"}</tool_call>',
        None,
        [("now", '{"a": "é"}')],
    ),
    ("hermes", '<tool_call>{"name": "now", "arguments": ""}</tool_call> ok', " ok", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null, "id": [7]}</tool_call>', None, [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now"} {"name": "now"}</tool_call>', None, [("now", "{}"), ("now", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "\\u006eow", "arguments": {"<tool_call>": "}"}}',
        None,
        [("now", '{"<tool_call>": "}"}')],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool', None, [("now", "{}")]),
    ("hermes", '<tool_call>no <tool_call>{"name": "now"}</tool_call>', "<tool_call>no ", [("now", "{}")]),
    # Slips that are mended: raw control characters, backslashes that escape nothing, trailing commas.
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "1\n\t2",}}', None, [("now", '{"a": "1\\n\\t2"}')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": ["\\d", ]}}', None, [("now", '{"a": ["\\\\d"]}')]),
    # llama3_json
    ("llama3_json", '{"name": "now", "parameters": {}}', None, [("now", "{}")]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "now", "parameters": {"a": 1}}; {"type": "function", "name": "now", "parameters": {}}',
        None,
        [("now", '{"a": 1}'), ("now", "{}")],
    ),
    ("llama3_json", 'Well: <|python_tag|>{"name": "now", "parameters": {}}', "Well: ", [("now", "{}")]),
    ("llama3_json", ' {"name": "now", "parameters": {}} Done.', " Done.", [("now", "{}")]),
    # mistral
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "now", "arguments": {"a": 1}, "id": "123456789"}, {"name": "now", "arguments": {}}]',
        None,
        [("now", '{"a": 1}'), ("now", "{}")],
    ),
    (
        "mistral",
        'So.[TOOL_CALLS]now[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]x1[ARGS]{"n": 2}',
        "So.",
        [("now", '{"a": 1}'), ("get_weather", '{"n": 2}')],
    ),
    ("mistral", '[TOOL_CALLS]now{"a": 1}', None, [("now", '{"a": 1}')]),
    # granite
    ("granite", '<|tool_call|>[{"name": "now", "arguments": {"a": 1}}]', None, [("now", '{"a": 1}')]),
    ("granite", '<tool_call>[{"name": "now", "arguments": {}}, {"name": "now"}]', None, [("now", "{}"), ("now", "{}")]),
    # phi4_mini
    ("phi4_mini", 'functools[{"name": "now", "arguments": {"a": 1}}]', None, [("now", '{"a": 1}')]),
    ("phi4_mini", '<|tool_call|>{"name": "now", "arguments": {"a": 1}}<|/tool_call|>', None, [("now", '{"a": 1}')]),
    # pythonic
    (
        "pythonic",
        "[get_weather(text='it\\'s \"x\"\\n', n=-1, items=[1, (2, 3.5,), {'k': None}], flag=True), now()]",
        None,
        [
            ("get_weather", '{"text": "it\'s \\"x\\"\\n", "n": -1, "items": [1, [2, 3.5], {"k": null}], "flag": true}'),
            ("now", "{}"),
        ],
    ),
    ("pythonic", '<|python_start|>[ now ( a = """x\n"y"""  , ) ]<|python_end|>', None, [("now", '{"a": "x\\n\\"y"}')]),
    (
        "pythonic",
        "[now(a='\\x41\\u00e9\\U0001F600\\q', b={}, c=0x10, d=1_0)]",
        None,
        [("now", '{"a": "Aé😀\\\\q", "b": {}, "c": 16, "d": 10}')],
    ),
    # qwen3_coder
    (
        "qwen3_coder",
        'Sure.\n<tool_call>\n<function=get_weather>\n<parameter=text>\nif "x":\n  <b>\n\n</parameter>\n'
        "<parameter=n>\n5\n</parameter>\n"
        '<parameter=other>\n{"q": [1]}\n</parameter>\n</function>\n</tool_call>',
        "Sure.\n",
        [("get_weather", '{"text": "if \\"x\\":\\n  <b>\\n", "n": 5, "other": {"q": [1]}}')],
    ),
    ("qwen3_coder", "<function=now></function><function=now>\n</function>", None, [("now", "{}"), ("now", "{}")]),
    # deepseek_v3
    (
        "deepseek_v3",
        "Ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n"
        '```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"n": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "Ok",
        [("now", '{"a": 1}'), ("get_weather", '{"n": 2}')],
    ),
]

NOT_CALLS = [
    ("hermes", "<tool_call>"),
    ("hermes", "a < b <tool_call"),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": "Paris"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": NaN}"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "no'),
    ("hermes", '<tool_call>{"name": 3}</tool_call>'),
    ("hermes", '<tool_call>{name: "now"}</tool_call>'),
    ("hermes", "<tool_call> [] </tool_call>"),
    ("llama3_json", '{"rivers": ["Rhine"]}'),
    ("llama3_json", '{"name": "Ada", "age": 36}'),
    ("llama3_json", 'Look: {"name": "now", "parameters": {}}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", "[1, 2]"),
    ("mistral", "[TOOL_CALLS]rm[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]now[ARGS]7"),
    ("mistral", "[TOOL_CALLS]"),
    ("granite", '<|tool_call|>[{"name": "rm", "arguments": {}}]'),
    ("phi4_mini", "from functools import partial"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[rm(a=1)]"),
    ("pythonic", "[now(a=x)]"),
    ("pythonic", "[now('positional')]"),
    ("pythonic", "[now(a=__import__('os'))]"),
    ("pythonic", "See [now()]"),
    ("qwen3_coder", "<tool_call>\n<function=rm>\n</function>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=now>\n<param"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>rm\n```json\n{}\n```"),
]

BROKEN = [
    # (format, text, arguments, content): the call was announced, the rest is content.
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": tru', '{"a": tru', None),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "x\\', '{"a": "x\\\\', None),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": x}}</tool_call>', '{"a": ', "x}}</tool_call>"),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a" 1}}', '{"a" ', "1}}"),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 01}}', '{"a": ', "01}}"),
    ("pythonic", "[now(a=1, b=[2, open('x')])]", '{"a": 1, "b": [2, ', "open('x')])]"),
    ("qwen3_coder", "<function=get_weather><parameter=n>12", '{"n": "12', None),
    ("qwen3_coder", "<function=get_weather><parameter=text>ab", '{"text": "ab', None),
    ("qwen3_coder", "<function=get_weather><parameter=n>1</parameter> so", '{"n": 1', " so"),
]

REASONED: list[tuple[str, bool, str, str | None, str | None]] = [
    ("think", False, "<think>\nHm.\n\nYes.\n</think>\n\nOk.\n", "Hm.\n\nYes.", "Ok.\n"),
    ("think", False, "\n<think>a</think>", "a", None),
    ("think", False, "<think>\n\n</think>\n\nOk", None, "Ok"),
    ("think", False, "<think>a </thin \n", "a </thin \n", None),
    ("think", False, "No <think>x</think>", None, "No <think>x</think>"),
    ("think", False, " <thin", None, " <thin"),
    ("think", True, "Hm.\n</think>\n\nOk </think>", "Hm.", "Ok </think>"),
    ("think", True, "<think>\nHm.</think>Ok", "Hm.", "Ok"),
    ("think", True, "Hm", "Hm", None),
    ("mistral", False, "[THINK]a[/THINK]b", "a", "b"),
    ("granite", False, "Here is my thought process: a.\n\nHere is my response: b", "a.", "b"),
    ("granite", False, "Here's my thought process:a Here's my response:b", "a", "b"),
    ("granite", False, "Here is my answer", None, "Here is my answer"),
]


def parser(tool: str | None, reasoning: str | None = None, starts_open: bool = False) -> OutputParser:
    numbers = count()
    return create(tool, reasoning, tools=TOOLS, new_id=lambda: f"call_{next(numbers)}", starts_open=starts_open)


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with adjacent deltas of one kind joined."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        match last, event:
            case (ContentDelta(a), ContentDelta(b)):
                out[-1] = ContentDelta(a + b)
            case (ReasoningDelta(a), ReasoningDelta(b)):
                out[-1] = ReasoningDelta(a + b)
            case (ToolCallArguments(index, a), ToolCallArguments(_, b)):
                out[-1] = ToolCallArguments(index, a + b)
            case _:
                out.append(event)
    return out


def streamed(make: Callable[[], OutputParser], pieces: Iterable[str]) -> list[Event]:
    running = make()
    events: list[Event] = []
    for piece in pieces:
        events += running.push(piece)
    return joined([*events, *running.finish()])


def check_splits(make: Callable[[], OutputParser], text: str, rng: random.Random, randoms: int = 5) -> list[Event]:
    """Whole, character by character, cut once anywhere, cut at random: always the same events."""
    whole = streamed(make, [text])
    assert streamed(make, text) == whole
    for cut in range(1, len(text)):
        assert streamed(make, [text[:cut], text[cut:]]) == whole, f"cut at {cut}"
    for _ in range(randoms):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(2, 8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert streamed(make, pieces) == whole, f"cut at {cuts}"
    return whole


@pytest.mark.parametrize(("tool", "text", "content", "calls"), CALLS)
def test_calls(tool: str, text: str, content: str | None, calls: list[Call]) -> None:
    message = parse(parser(tool), text)
    assert (message.content, message.reasoning) == (content, None)
    assert [(call.name, call.arguments) for call in message.tool_calls] == calls
    assert [call.id for call in message.tool_calls] == [f"call_{number}" for number in range(len(calls))]
    assert collect(check_splits(lambda: parser(tool), text, random.Random(0))) == message


@pytest.mark.parametrize(("tool", "text"), NOT_CALLS)
def test_what_is_no_call_is_content(tool: str, text: str) -> None:
    assert parse(parser(tool), text) == ParsedMessage(text, None, ())
    check_splits(lambda: parser(tool), text, random.Random(0))


@pytest.mark.parametrize(("tool", "text", "arguments", "content"), BROKEN)
def test_broken_calls_are_never_complete(tool: str, text: str, arguments: str, content: str | None) -> None:
    message = parse(parser(tool), text)
    assert [call.arguments for call in message.tool_calls] == [arguments]
    assert message.content == content
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)
    check_splits(lambda: parser(tool), text, random.Random(0))


@pytest.mark.parametrize(("name", "starts_open", "text", "reasoning", "content"), REASONED)
def test_reasoning(name: str, starts_open: bool, text: str, reasoning: str | None, content: str | None) -> None:
    message = parse(parser(None, name, starts_open), text)
    assert message == ParsedMessage(content, reasoning, ())
    check_splits(lambda: parser(None, name, starts_open), text, random.Random(0))


def test_reasoning_then_call() -> None:
    text = '<think>\nuse <tool_call>\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    message = collect(check_splits(lambda: parser("hermes", "think"), text, random.Random(0)))
    assert (message.content, message.reasoning) == (None, "use <tool_call>")
    assert [call.name for call in message.tool_calls] == ["now"]


def test_the_least_is_held_back() -> None:
    """Arguments and content come with the piece that brings them."""
    running = parser("hermes")
    assert running.push("Hi <") == [ContentDelta("Hi ")]
    assert running.push("b> <tool_") == [ContentDelta("<b> ")]
    assert running.push('call>{"name": "now", "arguments": ') == []
    assert running.push('{"ci') == [ToolCallStart(0, "call_0", "now"), ToolCallArguments(0, '{"ci')]
    assert running.push('ty": "P') == [ToolCallArguments(0, 'ty": "P')]
    assert running.push('aris", "n": 12') == [ToolCallArguments(0, 'aris", "n": ')]
    assert running.push("}}\n</tool_call>") == [ToolCallArguments(0, "12}")]
    assert running.finish() == []


def test_strings_of_qwen3_coder_are_streamed() -> None:
    running = parser("qwen3_coder")
    running.push("<function=get_weather><parameter=text>\nline")
    assert running.push(" more\n") == [ToolCallArguments(0, " more")]
    assert running.push("<") == []
    assert running.push("b") == [ToolCallArguments(0, "\\n<b")]


def test_white_space_is_content_without_calls() -> None:
    assert parse(parser("hermes"), " \n") == ParsedMessage(" \n", None, ())
    assert parse(parser("hermes"), "") == ParsedMessage(None, None, ())


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "12", "12"),
        ("text", "true", "true"),
        ("n", "12", 12),
        ("n", "twelve", "twelve"),
        ("flag", "True", True),
        ("items", '["a", {"b": null}]', ["a", {"b": None}]),
        ("items", "[1,", "[1,"),
        ("unit", " C ", "C"),
        ("unit", "K ", "K "),
        ("maybe", "null", None),
        ("maybe", "12", "12"),
        ("either", "12", 12),
        ("either", "[12]", "[12]"),
        ("unknown", "1.5", 1.5),
        ("unknown", "NaN", "NaN"),
        ("unknown", "1e999", "1e999"),
        ("unknown", "plain", "plain"),
        ("unknown", "[" * 5000, "[" * 5000),
        ("unknown", "9" * 5000, "9" * 5000),
    ],
)
def test_types_of_qwen3_coder(key: str, text: str, value: object) -> None:
    message = parse(parser("qwen3_coder"), f"<function=get_weather><parameter={key}>\n{text}\n</parameter></function>")
    assert json.loads(message.tool_calls[0].arguments) == {key: value}


@pytest.mark.parametrize("tool", tool_parser_names())
@pytest.mark.parametrize("reasoning", [None, *reasoning_parser_names()])
def test_every_combination_passes_content(tool: str, reasoning: str | None) -> None:
    text = "Plain text with < and [ and {} in it.\n"
    assert parse(parser(tool, reasoning), text) == ParsedMessage(text, None, ())


@pytest.mark.parametrize(
    "schema", [None, [], {"properties": 3}, {"properties": {"a": 3}}, {"properties": {"a": {"enum": 3}}}]
)
def test_odd_schemas_do_no_harm(schema: object) -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": schema}}]
    running = create("qwen3_coder", None, tools=tools, new_id=new_call_id)
    (call,) = parse(running, "<function=now><parameter=a>1</parameter></function>").tool_calls
    assert call.arguments == '{"a": 1}'


def test_without_tools_nothing_is_a_call() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>'
    assert parse(create("hermes", None, tools=[], new_id=new_call_id), text).content == text
    assert parse(create(None, None, tools=TOOLS, new_id=new_call_id), text).content == text


def test_call_ids() -> None:
    assert re.fullmatch(r"call_[0-9a-f]{24}", new_call_id())
    assert new_call_id() != new_call_id()
