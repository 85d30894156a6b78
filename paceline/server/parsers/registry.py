"""Output formats by name. A new format is one grammar and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.errors import ConfigError
from paceline.server.parsers.base import OutputParser
from paceline.server.parsers.chain import ChainedParser, PlainParser
from paceline.server.parsers.detect import Detected, detect
from paceline.server.parsers.json_calls import granite, hermes, llama3_json, phi4_mini
from paceline.server.parsers.named_calls import deepseek_v3, mistral
from paceline.server.parsers.pythonic import pythonic
from paceline.server.parsers.qwen3_coder import qwen3_coder
from paceline.server.parsers.reasoning import GRANITE, MISTRAL, THINK, ReasoningFormat, read_reasoning
from paceline.server.parsers.source import Reading, Source, T
from paceline.server.parsers.stream import CallSink, Sink, StreamParser
from paceline.server.parsers.tools import parameter_schemas

__all__ = [
    "Detected",
    "create",
    "detect",
    "opens_reasoning",
    "reasoning_parser_names",
    "tool_parser_names",
]

ToolGrammar = Callable[[Source, CallSink], Reading[None]]
Schemas = Mapping[str, Mapping[str, Any]]
"""Function name to the JSON schema of its parameters."""

_TOOL_FORMATS: dict[str, Callable[[Schemas], ToolGrammar]] = {
    "hermes": lambda _: hermes,
    "llama3_json": lambda _: llama3_json,
    "mistral": lambda _: mistral,
    "granite": lambda _: granite,
    "pythonic": lambda _: pythonic,
    "qwen3_coder": lambda schemas: lambda source, sink: qwen3_coder(source, sink, schemas),
    "deepseek_v3": lambda _: deepseek_v3,
    "phi4_mini": lambda _: phi4_mini,
}
_REASONING_FORMATS: dict[str, ReasoningFormat] = {"think": THINK, "granite": GRANITE, "mistral": MISTRAL}

MARKERS = (
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "<think>",
    "</think>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "[THINK]",
    "[/THINK]",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
"""Texts that the parsers look for. Some tokenizers have them as special tokens, which must then stay in the text."""


def tool_parser_names() -> tuple[str, ...]:
    """Names that `create` takes as `tool`."""
    return tuple(_TOOL_FORMATS)


def reasoning_parser_names() -> tuple[str, ...]:
    """Names that `create` takes as `reasoning`."""
    return tuple(_REASONING_FORMATS)


def create(
    tool: str | None,
    reasoning: str | None,
    *,
    tools: Sequence[Mapping[str, Any]],
    new_id: Callable[[], str],
    starts_open: bool = False,
) -> OutputParser:
    """A parser for one answer.

    Args:
        tool: format of tool calls; None passes them through as content.
        reasoning: format of the reasoning; None passes it through as content.
        tools: the request's tools; without any, nothing is a call.
        new_id: makes the id of a call, such as `base.new_call_id`.
        starts_open: the prompt has opened the reasoning (`opens_reasoning`).

    Raises:
        ConfigError: there is no format of that name.
    """
    answer: OutputParser = PlainParser()
    if tool is not None:
        grammar = _look_up(_TOOL_FORMATS, tool, "tool_parser")
        if schemas := parameter_schemas(tools):
            source = Source()
            sink = CallSink(source, schemas.keys(), new_id)
            answer = StreamParser(source, sink, grammar(schemas)(source, sink))
    if reasoning is None:
        return answer
    form = _look_up(_REASONING_FORMATS, reasoning, "reasoning_parser")
    thoughts, collected = Source(), Sink()
    first = StreamParser(thoughts, collected, read_reasoning(thoughts, collected, form, starts_open))
    return ChainedParser(first, answer)


def opens_reasoning(prompt: str, reasoning: str | None) -> bool:
    """Whether a rendered prompt ends with the begin marker of its reasoning format, so that the answer is inside."""
    if reasoning is None:
        return False
    return prompt.rstrip().endswith(_look_up(_REASONING_FORMATS, reasoning, "reasoning_parser").begin)


def _look_up(table: Mapping[str, T], name: str, field: str) -> T:
    if name not in table:
        raise ConfigError(f"unknown format {name!r}.", field=field, fix=f"Known formats: {', '.join(table)}.")
    return table[name]
