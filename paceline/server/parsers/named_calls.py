"""Calls whose name stands before the JSON of the arguments.

| format | a call |
|---|---|
| mistral | `[TOOL_CALLS]name[ARGS]{...}`, maybe with `[CALL_ID]id` before `[ARGS]`; older: `[TOOL_CALLS][{...}, ...]` |
| deepseek_v3 | `<｜tool▁calls▁begin｜>`, calls, `<｜tool▁calls▁end｜>`; see `_deepseek_call` |
"""

from __future__ import annotations

from paceline.server.parsers.json_calls import json_calls, read_arguments
from paceline.server.parsers.source import Markers, NotACall, Reading, Source
from paceline.server.parsers.stream import CallSink, closing, marked_calls

_CALL_BEGIN = "<｜tool▁call▁begin｜>"
_CALL_END = "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"


def mistral(source: Source, sink: CallSink) -> Reading[None]:
    """`[TOOL_CALLS]` and a list of calls, or a name and its arguments."""
    return marked_calls(source, sink, Markers("[TOOL_CALLS]"), lambda _: _mistral_calls(source, sink))


def _mistral_calls(source: Source, sink: CallSink) -> Reading[None]:
    yield from source.space()
    if (yield from source.peek()) in ("[", "{"):
        yield from json_calls(source, sink)
        return
    name = sink.known((yield from source.word()))
    if (yield from source.accept("[CALL_ID]")):
        yield from source.word()
    # Some tokenizers make [ARGS] a special token, which a decoder may have left out.
    yield from source.accept("[ARGS]")
    yield from source.space()
    yield from read_arguments(source, sink, name)


def deepseek_v3(source: Source, sink: CallSink) -> Reading[None]:
    """A block of calls between its own markers."""
    return marked_calls(source, sink, Markers("<｜tool▁calls▁begin｜>"), lambda _: _deepseek_calls(source, sink))


def _deepseek_calls(source: Source, sink: CallSink) -> Reading[None]:
    yield from source.space()
    while (yield from source.accept(_CALL_BEGIN)):
        yield from _deepseek_call(source, sink)
        yield from closing(source, _CALL_END)
        yield from source.space()
    yield from closing(source, "<｜tool▁calls▁end｜>")


def _deepseek_call(source: Source, sink: CallSink) -> Reading[None]:
    """V3 and R1: `function` SEPARATOR name, then the arguments in a Markdown block. V3.1: name SEPARATOR arguments."""
    name = yield from source.word()
    yield from source.expect(_SEPARATOR)
    yield from source.space()
    fenced = (yield from source.peek()) != "{"
    if fenced:
        if name != "function":
            raise NotACall
        name = yield from source.word()
        yield from source.space()
        yield from source.expect("```json")
        yield from source.space()
    yield from read_arguments(source, sink, sink.known(name))
    if fenced:
        yield from closing(source, "```")
