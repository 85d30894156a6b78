"""The XML-like calls of Qwen3-Coder and Qwen 3.5.

    <tool_call>
    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    </tool_call>

Values are bare text: what they are is told by the function's JSON schema, or guessed. Values that can only be strings
are passed on while they arrive, others when they are complete. Some models leave out `<tool_call>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from paceline.server.parsers.json_text import dump, load, string_body
from paceline.server.parsers.source import Markers, NotACall, Reading, Source, until
from paceline.server.parsers.stream import CallSink, closing, marked_calls

_KEY = re.compile(r"[^<>\n]*")
_LONGEST_KEY = 256
"""Characters; a bound on what is held back."""
_VALUE_END = Markers("\n</parameter>", "</parameter>")


def qwen3_coder(source: Source, sink: CallSink, schemas: Mapping[str, Mapping[str, Any]]) -> Reading[None]:
    """Content and calls. `schemas`: the parameters of each function."""

    def calls(marker: str) -> Reading[None]:
        if marker == "<tool_call>":
            yield from source.space()
            yield from source.expect("<function=")
        yield from _function(source, sink, schemas)
        yield from closing(source, "</tool_call>")

    return marked_calls(source, sink, Markers("<tool_call>", "<function="), calls)


def _function(source: Source, sink: CallSink, schemas: Mapping[str, Mapping[str, Any]]) -> Reading[None]:
    name = sink.known((yield from source.word()))
    properties = schemas[name].get("properties")
    yield from source.expect(">")
    yield from source.space()
    started = False
    while not (yield from source.accept("</function>")):
        yield from source.expect("<parameter=")
        key = yield from source.token(_KEY, _LONGEST_KEY)
        source.advance(source.pos + len(key))
        yield from source.expect(">")
        if not started:
            sink.start(name)
        sink.arguments(f"{', ' if started else '{'}{dump(key)}: ")
        started = True
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        yield from _value(source, sink, schema if isinstance(schema, Mapping) else {})
        yield from source.space()
    if not started:
        sink.start(name)
    sink.arguments("}" if started else "{}")


def _value(source: Source, sink: CallSink, schema: Mapping[str, Any]) -> Reading[None]:
    yield from source.accept("\n")
    if schema_types(schema) == {"string"} and "enum" not in schema:
        sink.arguments('"')
        if (yield from until(source, _VALUE_END, lambda text: sink.arguments(string_body(text)))) is None:
            raise NotACall
        sink.arguments('"')
        return
    pieces: list[str] = []
    end = yield from until(source, _VALUE_END, pieces.append)
    text = "".join(pieces)
    if end is None:
        # Cut off: an open string keeps the text and leaves the arguments incomplete.
        sink.arguments('"' + string_body(text))
        raise NotACall
    sink.arguments(typed(text, schema))


def typed(text: str, schema: Mapping[str, Any]) -> str:
    """The JSON text of a bare value, of a type its JSON schema allows where that can be."""
    types = schema_types(schema)
    word = text.strip()
    choices = schema.get("enum")
    if isinstance(choices, list) and word in choices:
        return dump(word)
    if word.lower() in ("true", "false") and "boolean" in types and "string" not in types:
        return word.lower()
    try:
        value = load(text)
        if not types or types & _types_of(value) or "string" not in types:
            return dump(value)
    except ValueError:
        pass
    return dump(text)


def schema_types(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types a JSON schema allows; empty if it does not say.

    Alternatives are followed one level deep: schemas come from clients, and a deep one must not make us recurse.
    """
    options = schema.get("anyOf") or schema.get("oneOf")
    if "type" in schema or not isinstance(options, list):
        return _own_types(schema)
    each = [_own_types(option) for option in options]
    return frozenset().union(*each) if all(each) else frozenset()


def _own_types(schema: object) -> frozenset[str]:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = kind if isinstance(kind, list) else [kind]
    return frozenset(one for one in kinds if isinstance(one, str))


def _types_of(value: object) -> frozenset[str]:
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"number"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
    return frozenset({"object"})
