"""`tool_choice` by grammar: what xgrammar accepts parses back into an allowed call with fitting arguments."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from paceline.errors import RequestError
from paceline.server.parsers.base import ParsedMessage, parse
from paceline.server.parsers.constraint import constrained_formats, tool_grammar
from paceline.server.parsers.registry import create, tool_parser_names

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "days": {"type": "integer"},
                    "where": {"$ref": "#/$defs/place"},
                },
                "required": ["unit", "where"],
                "additionalProperties": False,
                "$defs": {
                    "place": {
                        "type": "object",
                        "properties": {"city": {"type": "string", "maxLength": 5}},
                        "required": ["city"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"properties": {"utc": {"type": "boolean"}}}}},
    {"type": "function", "function": {"name": "anything"}},
]
GOOD = {"unit": "C", "where": {"city": "Rome"}}
EOS = 256


def text_of(tool_format: str, *calls: tuple[str, Any]) -> str:
    """The calls as a model would write them in a format."""
    names = [name for name, _ in calls]
    values = [json.dumps(arguments) for _, arguments in calls]
    both = list(zip(names, values, strict=True))
    objects = [f'{{"name": "{name}", "arguments": {value}}}' for name, value in both]
    match tool_format:
        case "hermes":
            return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
        case "llama3_json":
            return "; ".join(f'{{"name": "{name}", "parameters": {value}}}' for name, value in both)
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(objects)}]"
        case "granite":
            return f"<|tool_call|>[{', '.join(objects)}]"
        case "phi4_mini":
            return f"functools[{', '.join(objects)}]"
        case "qwen3_coder":
            return "\n".join(_qwen(name, arguments) for name, arguments in calls)
        case "deepseek_v3":
            begin, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
            inner = [f"{begin}function{separator}{name}\n```json\n{value}\n```{end}" for name, value in both]
            return "<｜tool▁calls▁begin｜>" + "\n".join(inner) + "<｜tool▁calls▁end｜>"
    raise AssertionError(tool_format)


def _qwen(name: str, arguments: Any) -> str:
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters or chr(10)}</function>\n</tool_call>"


class Matching:
    """A grammar over single bytes and an end token."""

    def __init__(self, grammar: dict[str, Any]) -> None:
        self.xgr = pytest.importorskip("xgrammar")
        vocabulary = [bytes([byte]) for byte in range(256)] + [b"<eos>"]
        info = self.xgr.TokenizerInfo(vocabulary, vocab_size=257, stop_token_ids=[EOS])
        self.compiled = self.xgr.GrammarCompiler(info).compile_structural_tag(grammar["structural_tag"])

    def accepts(self, text: str) -> bool:
        matcher = self.xgr.GrammarMatcher(self.compiled)
        return bool(matcher.accept_string(text) and matcher.accept_token(EOS))

    def sample(self, rng: random.Random, longest: int = 3000) -> str | None:
        """A random text of the language; None if it got too long."""
        matcher = self.xgr.GrammarMatcher(self.compiled)
        mask = self.xgr.allocate_token_bitmask(1, 257)
        out = bytearray()
        for _ in range(longest):
            matcher.fill_next_token_bitmask(mask)
            words = mask[0].tolist()
            allowed = [token for token in range(257) if words[token // 32] >> (token % 32) & 1]
            # Closing characters are favoured so that texts end, others kept to readable ones.
            ending = [token for token in allowed if token == EOS or chr(token) in '"}]<\n']
            readable = [token for token in allowed if 32 <= token < 127 or token == EOS] or allowed
            token = rng.choice(ending if ending and rng.random() < 0.5 else readable)
            assert matcher.accept_token(token)
            if token == EOS:
                return out.decode()
            out.append(token)
        return None


def parsed(tool_format: str, text: str) -> ParsedMessage:
    return parse(create(tool_format, None, tools=TOOLS, new_id=lambda: "id"), text)


def fits(name: str, arguments: Any) -> bool:
    """Whether arguments satisfy the schema of a function of TOOLS, checked by hand."""
    if name == "get_weather":
        return (
            {"unit", "where"} <= arguments.keys() <= {"unit", "days", "where"}
            and arguments["unit"] in ("C", "F")
            and isinstance(arguments.get("days", 0), int)
            and arguments["where"].keys() == {"city"}
            and len(arguments["where"]["city"]) <= 5
        )
    if name == "now":
        return isinstance(arguments.get("utc", True), bool)
    return isinstance(arguments, dict)


@pytest.mark.parametrize("tool_format", constrained_formats())
def test_accepts_calls_and_nothing_else(tool_format: str) -> None:
    matching = Matching(tool_grammar(tool_format, TOOLS, None, parallel=True))
    for calls in ([("get_weather", GOOD)], [("get_weather", GOOD | {"days": 3}), ("now", {"utc": True}), ("now", {})]):
        if tool_format == "qwen3_coder":
            # Its values stand in the order of the schema.
            calls = [(name, {key: a[key] for key in ("unit", "days", "where", "utc") if key in a}) for name, a in calls]
        elif "days" in calls[0][1]:
            calls[0] = ("get_weather", {"unit": "C", "days": 3, "where": {"city": "Rome"}})
        text = text_of(tool_format, *calls)
        assert matching.accepts(text), text
        found = parsed(tool_format, text)
        assert found.content is None
        assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == calls
    good = text_of(tool_format, ("get_weather", GOOD))
    wrong = [
        "",
        "It is sunny.",
        good + "!",
        " " + good,
        good[:-1],
        good.replace("get_weather", "rm"),
        good.replace("Rome", "Rome, Italy"),
        text_of(tool_format, ("get_weather", {"unit": "K", "where": {"city": "Rome"}})),
        text_of(tool_format, ("get_weather", {"unit": "C"})),
        text_of(tool_format, ("now", {"utc": "maybe"})),
    ]
    assert [text for text in wrong if matching.accepts(text)] == []


@pytest.mark.parametrize("tool_format", constrained_formats())
def test_one_call_of_a_named_function(tool_format: str) -> None:
    matching = Matching(tool_grammar(tool_format, TOOLS, ["now"], parallel=False))
    now = ("now", {"utc": False})
    assert matching.accepts(text_of(tool_format, now))
    assert not matching.accepts(text_of(tool_format, now, now))
    assert not matching.accepts(text_of(tool_format, ("get_weather", GOOD)))


@pytest.mark.parametrize("tool_format", constrained_formats())
def test_random_texts_of_the_grammar_parse_back(tool_format: str) -> None:
    rng = random.Random(3)
    matching = Matching(tool_grammar(tool_format, TOOLS, ["get_weather", "now"], parallel=True))
    texts = [text for _ in range(12) if (text := matching.sample(rng)) is not None]
    assert len(texts) >= 6, "too many texts did not end"
    for text in texts:
        found = parsed(tool_format, text)
        assert found.content is None, text
        assert found.tool_calls, text
        for call in found.tool_calls:
            assert fits(call.name, json.loads(call.arguments)), text


@pytest.mark.parametrize("tool_format", constrained_formats())
def test_a_function_without_a_schema_takes_no_arguments(tool_format: str) -> None:
    matching = Matching(tool_grammar(tool_format, TOOLS, ["anything"], parallel=False))
    assert matching.accepts(text_of(tool_format, ("anything", {})))
    if tool_format != "qwen3_coder":
        assert not matching.accepts(text_of(tool_format, ("anything", {"a": [1]})))
        assert not matching.accepts(text_of(tool_format, ("anything", 7)))


def test_grammars_are_json() -> None:
    for tool_format in constrained_formats():
        grammar = tool_grammar(tool_format, TOOLS, None, parallel=True)
        assert json.loads(json.dumps(grammar)) == grammar


def test_refusals() -> None:
    assert set(constrained_formats()) < set(tool_parser_names())
    for call in (
        lambda: tool_grammar("pythonic", TOOLS, None, True),
        lambda: tool_grammar("hermes", TOOLS, ["rm"], True),
        lambda: tool_grammar("hermes", [], None, True),
    ):
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.field == "tool_choice"
        assert caught.value.fix
