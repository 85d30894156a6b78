"""Calls written as JSON objects: `{"name": ..., "arguments": {...}}`, alone, in a row or in a list.

| format | a call |
|---|---|
| hermes | `<tool_call>{...}</tool_call>` (Hermes, Qwen 2.5, Qwen 3, SmolLM2, Granite 4) |
| llama3_json | the whole answer is `{...}`, or `{...}; {...}`, or follows `<|python_tag|>` |
| granite | `<|tool_call|>[{...}, ...]`, `<tool_call>[{...}]` |
| phi4_mini | `functools[{...}, ...]`, `<|tool_call|>{...}<|/tool_call|>` |
"""

from __future__ import annotations

from paceline.server.parsers.json_text import dump, load, read_string, read_value
from paceline.server.parsers.source import Markers, NotACall, Reading, Source, ignore
from paceline.server.parsers.stream import CallSink, attempt, closing, marked_calls

_ARGUMENTS = ("arguments", "parameters")
_USUAL_KEYS = ("name", "type", "id", *_ARGUMENTS)


def hermes(source: Source, sink: CallSink) -> Reading[None]:
    """`<tool_call>` JSON `</tool_call>`."""
    markers = Markers("<tool_call>")
    return marked_calls(source, sink, markers, lambda _: json_calls(source, sink, "</tool_call>"))


def granite(source: Source, sink: CallSink) -> Reading[None]:
    """`<|tool_call|>` and a list of calls."""
    markers = Markers("<|tool_call|>", "<tool_call>")
    return marked_calls(source, sink, markers, lambda _: json_calls(source, sink, "</tool_call>"))


def phi4_mini(source: Source, sink: CallSink) -> Reading[None]:
    """`functools` and a list of calls, or a call between `<|tool_call|>` and `<|/tool_call|>`."""
    markers = Markers("functools", "<|tool_call|>")
    return marked_calls(source, sink, markers, lambda _: json_calls(source, sink, "<|/tool_call|>"))


def llama3_json(source: Source, sink: CallSink) -> Reading[None]:
    """The answer begins with a call, or a call follows `<|python_tag|>`.

    Without a marker an answer in JSON looks much like a call, so no unusual keys are allowed: an object that has one
    is content at once, and not only when it ends without a name.
    """
    yield from attempt(source, sink, json_calls(source, sink, plain=True))
    markers = Markers("<|python_tag|>")
    yield from marked_calls(source, sink, markers, lambda _: json_calls(source, sink, plain=True))


def json_calls(source: Source, sink: CallSink, close: str = "", *, plain: bool = False) -> Reading[None]:
    """One or more calls, listed in brackets or one after another, then the closing marker.

    Args:
        close: the closing marker; it may be missing.
        plain: refuse objects with unusual keys.

    Raises:
        NotACall: no call here; calls before it stand.
    """
    yield from source.space()
    listed = yield from source.accept("[")
    while True:
        yield from json_call(source, sink, plain=plain)
        source.commit()
        yield from source.space()
        if listed:
            if not (yield from source.accept(",")):
                yield from source.expect("]")
                source.commit()
                break
        else:
            separated = (yield from source.accept(";")) or (yield from source.accept(","))
            if not separated and (yield from source.peek()) != "{":
                break
        yield from source.space()
    if close:
        yield from closing(source, close)


def json_call(source: Source, sink: CallSink, *, plain: bool) -> Reading[None]:
    """One call, its members in any order.

    Raises:
        NotACall: it is not JSON, names no known function, or its arguments are no object.
    """
    call = _Call(source, sink)
    yield from source.expect("{")
    yield from source.space()
    while (yield from source.peek()) != "}":
        key = yield from _string(source)
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        if plain and key not in _USUAL_KEYS:
            raise NotACall
        yield from call.member(key)
        yield from source.space()
        if not (yield from source.accept(",")):
            break
        yield from source.space()
    yield from source.expect("}")
    call.close()


def read_arguments(source: Source, sink: CallSink, name: str) -> Reading[None]:
    """Announces a call and passes on its arguments, a JSON object.

    Raises:
        NotACall: something else comes next, or the object breaks off.
    """
    if (yield from source.peek()) != "{":
        raise NotACall
    sink.start(name)
    yield from read_value(source, sink.arguments)


class _Call:
    """What is known of a call whose object is being read."""

    def __init__(self, source: Source, sink: CallSink) -> None:
        self._source = source
        self._sink = sink
        self._name: str | None = None
        self._waiting: str | None = None
        """Arguments that came before the name."""
        self._started = False

    def member(self, key: str) -> Reading[None]:
        """Reads the value of one member."""
        if self._started or (key != "name" and key not in _ARGUMENTS):
            yield from read_value(self._source, ignore)
        elif key == "name":
            self._name = self._sink.known((yield from _string(self._source)))
            if self._waiting is not None:
                self._start(self._name, self._waiting)
        elif self._name is not None and (yield from self._source.peek()) == "{":
            self._started = True
            yield from read_arguments(self._source, self._sink, self._name)
        else:
            pieces: list[str] = []
            yield from read_value(self._source, pieces.append)
            self._waiting = _object("".join(pieces))
            if self._name is not None:
                self._start(self._name, self._waiting)

    def close(self) -> None:
        """The object has ended.

        Raises:
            NotACall: it has no name.
        """
        if self._name is None:
            raise NotACall
        if not self._started:
            self._start(self._name, "{}")

    def _start(self, name: str, arguments: str) -> None:
        self._started = True
        self._sink.start(name)
        self._sink.arguments(arguments)


def _string(source: Source) -> Reading[str]:
    if (yield from source.peek()) != '"':
        raise NotACall
    pieces: list[str] = []
    yield from read_string(source, pieces.append)
    return str(load("".join(pieces)))


def _object(text: str) -> str:
    """The JSON object meant by arguments given whole: an object, an object in a string, or nothing.

    Raises:
        NotACall: they are something else.
    """
    if text.startswith("{"):
        return text
    try:
        value = load(text)
        if isinstance(value, str):
            value = load(value) if value.strip() else None
        if isinstance(value, dict | None):
            return dump(value or {})
    except ValueError:
        pass
    raise NotACall
