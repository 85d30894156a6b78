"""Calls in Python syntax: the whole answer is `[f(a=1, b="x"), g()]`, as Llama 3.2 and Llama 4 write.

Literals are turned into JSON while they arrive. The text is not given to Python's parser as a whole: that would hold
the call back to its end, and a hostile text of many operators can exhaust its stack. Only single numbers go through
`ast.literal_eval`.
"""

from __future__ import annotations

import ast
import re

from paceline.server.parsers.json_text import MAX_DEPTH, dump, string_body
from paceline.server.parsers.source import NotACall, Reading, Source, Write, rest
from paceline.server.parsers.stream import CallSink, attempt, closing

_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_CLOSERS = {"[": "]", "(": ")", "{": "}"}
_SCALAR_CHARS = re.compile(r"[-+.0-9A-Za-z_]*")
_NUMBER = re.compile(r"[-+]?\.?[0-9][0-9_.]*(?:[eE][-+]?[0-9]+)?|[-+]?0[xX][0-9a-fA-F]+")
_LONGEST_SCALAR = 64
_PLAIN = re.compile(r"""[^'"\\\n]+""")
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4}|[^xuU])")
_ESCAPE_BEGUN = re.compile(r"\\(?:x[0-9a-fA-F]?|u[0-9a-fA-F]{0,3}|U[0-9a-fA-F]{0,7})?")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"', "\n": ""}


def pythonic(source: Source, sink: CallSink) -> Reading[None]:
    """Calls at the start of the answer, then content."""
    yield from attempt(source, sink, _calls(source, sink))
    yield from rest(source, sink.content)


def _calls(source: Source, sink: CallSink) -> Reading[None]:
    yield from source.space()
    yield from source.accept("<|python_start|>")
    yield from source.space()
    yield from source.expect("[")
    while True:
        yield from source.space()
        yield from _call(source, sink)
        yield from source.space()
        comma = yield from source.accept(",")
        yield from source.space()
        if (yield from source.accept("]")):
            break
        if not comma:
            raise NotACall
    source.commit()
    yield from closing(source, "<|python_end|>")


def _call(source: Source, sink: CallSink) -> Reading[None]:
    name = sink.known((yield from source.word()))
    yield from source.space()
    yield from source.expect("(")
    yield from source.space()
    started = False
    prefix = "{"

    def write(text: str) -> None:
        # Not before there is a value: `f(a=variable)` is no call.
        nonlocal started, prefix
        if not started:
            started = True
            sink.start(name)
        sink.arguments(prefix + text)
        prefix = ""

    while not (yield from source.accept(")")):
        prefix += dump((yield from source.word())) + ": "
        yield from source.space()
        yield from source.expect("=")
        yield from read_literal(source, write)
        prefix = ", "
        yield from source.space()
        if not (yield from source.accept(",")):
            yield from source.expect(")")
            break
        yield from source.space()
    if not started:
        sink.start(name)
    sink.arguments("}" if started else "{}")


def read_literal(source: Source, write: Write) -> Reading[None]:
    """Consumes a Python literal and writes it as JSON while it comes; tuples become arrays. There is no recursion.

    Raises:
        NotACall: the text is no literal from the position on, or has no counterpart in JSON.
    """
    closers: list[str] = []
    while True:
        yield from source.space()
        char = yield from source.peek()
        if char in ("'", '"'):
            yield from _read_string(source, write)
        elif char in _CLOSERS:
            source.advance(source.pos + 1)
            write("{" if char == "{" else "[")
            if len(closers) == MAX_DEPTH:
                raise NotACall
            closers.append(_CLOSERS[char])
            yield from source.space()
            if (yield from source.peek()) != closers[-1]:
                if char == "{":
                    yield from _read_key(source, write)
                continue
        else:
            yield from _read_scalar(source, write)
        # A value has ended, or a bracket was opened that closes at once.
        while closers:
            yield from source.space()
            comma = yield from source.accept(",")
            yield from source.space()
            if (yield from source.accept(closers[-1])):
                write("}" if closers.pop() == "}" else "]")
                continue
            if not comma:
                raise NotACall
            write(", ")
            if closers[-1] == "}":
                yield from _read_key(source, write)
            break
        else:
            return


def _read_key(source: Source, write: Write) -> Reading[None]:
    if (yield from source.peek()) not in ("'", '"'):
        raise NotACall
    yield from _read_string(source, write)
    yield from source.space()
    yield from source.expect(":")
    write(": ")


def _read_scalar(source: Source, write: Write) -> Reading[None]:
    token = yield from source.token(_SCALAR_CHARS, _LONGEST_SCALAR)
    text = _WORDS.get(token)
    if text is None:
        if not _NUMBER.fullmatch(token):
            raise NotACall
        try:
            text = dump(int(token) if token.isdecimal() and token[0] != "0" else ast.literal_eval(token))
        except (ValueError, SyntaxError) as error:
            raise NotACall from error
    source.advance(source.pos + len(token))
    write(text)


def _read_string(source: Source, write: Write) -> Reading[None]:
    quote = source.advance(source.pos + 1)
    if (yield from source.accept(quote * 2)):
        quote *= 3
    elif (yield from source.accept(quote)):
        write('""')
        return
    write('"')
    while not (yield from source.accept(quote)):
        char = yield from source.peek()
        plain = _PLAIN.match(source.text, source.pos)
        if plain:
            write(string_body(source.advance(plain.end())))
        elif char == "\\":
            write(string_body((yield from _read_escape(source))))
        elif char and (char != "\n" or len(quote) == 3):
            write(string_body(source.advance(source.pos + 1)))
        else:
            raise NotACall
    write('"')


def _read_escape(source: Source) -> Reading[str]:
    while not (found := _ESCAPE.match(source.text, source.pos)):
        if not _ESCAPE_BEGUN.fullmatch(source.text, source.pos) or not (yield from source.more()):
            return source.advance(source.pos + 1)
    escape = source.advance(found.end())
    if len(escape) > 2:
        return chr(int(escape[2:], 16))
    return _ESCAPED.get(escape[1], escape)
