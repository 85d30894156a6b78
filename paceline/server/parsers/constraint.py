"""`tool_choice` by grammar: what the generated text must look like so that it is a call of an allowed function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.errors import RequestError
from paceline.server.parsers.json_text import dump
from paceline.server.parsers.tools import parameter_schemas


@dataclass(frozen=True, slots=True)
class _Shape:
    """The text around arguments. `{name}` and `{quoted}` stand for the function's name, bare and as a JSON string."""

    begin: str
    end: str
    separator: str
    prefix: str = ""
    """Before the first call."""
    suffix: str = ""
    """After the last call."""
    style: str = "json"
    """How arguments are written, in xgrammar's words."""


_OBJECT = '{"name": {quoted}, "arguments": '

_SHAPES = {
    "hermes": _Shape("<tool_call>\n" + _OBJECT, "}\n</tool_call>", "\n"),
    "llama3_json": _Shape('{"name": {quoted}, "parameters": ', "}", "; "),
    "mistral": _Shape(_OBJECT, "}", ", ", "[TOOL_CALLS][", "]"),
    "granite": _Shape(_OBJECT, "}", ", ", "<|tool_call|>[", "]"),
    "phi4_mini": _Shape(_OBJECT, "}", ", ", "functools[", "]"),
    "qwen3_coder": _Shape("<tool_call>\n<function={name}>\n", "\n</function>\n</tool_call>", "\n", style="qwen_xml"),
    "deepseek_v3": _Shape(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        "\n",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
}


def constrained_formats() -> tuple[str, ...]:
    """Tool formats that `tool_grammar` knows."""
    return tuple(_SHAPES)


def tool_grammar(
    tool_format: str, tools: Sequence[Mapping[str, Any]], names: Sequence[str] | None, parallel: bool
) -> dict[str, Any]:
    """What a text of one or more calls looks like, for `tool_choice: "required"` or a named function.

    The constraint covers the whole answer: reasoning must be over, or switched off, where it begins.

    Args:
        tool_format: a name of `constrained_formats`.
        tools: the request's tools.
        names: the functions that may be called; None: all of them.
        parallel: several calls are allowed.

    Returns:
        `{"structural_tag": ...}`, a structural tag of xgrammar as JSON.

    Raises:
        RequestError: the format cannot be constrained, or there is no such function.
    """
    if tool_format not in _SHAPES:
        raise RequestError(
            f"a function call cannot be enforced in the tool format {tool_format!r}.",
            field="tool_choice",
            fix=f'Use "auto" or "none", or start the server with one of the tool formats {", ".join(_SHAPES)}.',
        )
    shape = _SHAPES[tool_format]
    calls: dict[str, Any] = {
        "type": "tags_with_separator",
        "tags": [_tag(shape, name, schema) for name, schema in _allowed(tools, names).items()],
        "separator": shape.separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    if shape.prefix:
        calls = {"type": "tag", "begin": shape.prefix, "content": calls, "end": shape.suffix}
    return {"structural_tag": {"type": "structural_tag", "format": calls}}


def _allowed(tools: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> dict[str, Mapping[str, Any]]:
    schemas = parameter_schemas(tools)
    if not schemas:
        raise RequestError(
            "a function call is required and there are no tools.", field="tool_choice", fix="Give tools."
        )
    for name in names or ():
        if name not in schemas:
            raise RequestError(
                f"there is no function {name!r} in the tools.",
                field="tool_choice",
                fix=f"Name one of {', '.join(schemas)}.",
            )
    return schemas if names is None else {name: schemas[name] for name in names}


def _tag(shape: _Shape, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    begin = shape.begin.replace("{quoted}", dump(name)).replace("{name}", name)
    # A schema that leaves its type open would let through arguments that are no object.
    typed = schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}
    content = {
        "type": "json_schema",
        "json_schema": dict(schema) if typed else {"type": "object", **schema},
        "style": shape.style,
        "max_whitespace_cnt": 1,  # a weak model can write blanks for ever
    }
    return {"type": "tag", "begin": begin, "content": content, "end": shape.end}
