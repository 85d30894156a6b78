"""JSON as text: a scanner that passes a value on while it arrives, and strict reading and writing of whole values."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from paceline.server.parsers.source import NotACall, Reading, Source, Write

MAX_DEPTH = 128
"""Brackets inside one another. Deeper values are refused: whoever reads them later may recurse."""

_LONGEST_SCALAR = 512
"""Characters of a number; far beyond what any reader keeps."""
_SCALAR_CHARS = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_value(source: Source, write: Write) -> Reading[None]:
    """Consumes one JSON value and writes its text as it comes.

    What is written is valid JSON, since three slips of models are mended: control characters in strings are escaped, a
    backslash that escapes nothing is doubled, a comma before a closing bracket is left out. There is no recursion.

    Raises:
        NotACall: the text is not JSON from the position on, is nested too deep, or ends within the value.
    """
    closers: list[str] = []
    while True:
        yield from source.space(write)
        char = yield from source.peek()
        if char == '"':
            yield from read_string(source, write)
        elif char in ("{", "["):
            write(source.advance(source.pos + 1))
            if len(closers) == MAX_DEPTH:
                raise NotACall
            closers.append("}" if char == "{" else "]")
            yield from source.space(write)
            if (yield from source.peek()) != closers[-1]:
                if char == "{":
                    yield from _read_key(source, write)
                continue
        else:
            yield from _read_scalar(source, write)
        # A value has ended, or a bracket was opened that closes at once.
        while closers:
            yield from source.space(write)
            comma: list[str] = []
            if (yield from source.accept(",")):
                comma.append(",")
                yield from source.space(comma.append)
            if (yield from source.accept(closers[-1])):
                write(closers.pop())
                continue
            write("".join(comma))
            if not comma:
                raise NotACall
            if closers[-1] == "}":
                yield from _read_key(source, write)
            break
        else:
            return


def _read_key(source: Source, write: Write) -> Reading[None]:
    yield from source.space(write)
    if (yield from source.peek()) != '"':
        raise NotACall
    yield from read_string(source, write)
    yield from source.space(write)
    yield from source.expect(":")
    write(":")


def read_string(source: Source, write: Write) -> Reading[None]:
    """Consumes a JSON string, from its opening quote to its closing one, and writes its text as it comes.

    Raises:
        NotACall: the text ends within the string.
    """
    write(source.advance(source.pos + 1))
    while (char := (yield from source.peek())) != '"':
        plain = _PLAIN.match(source.text, source.pos)
        if plain:
            write(source.advance(plain.end()))
        elif char == "\\":
            write((yield from _read_escape(source)))
        elif char:
            source.advance(source.pos + 1)
            write(string_body(char))
        else:
            raise NotACall
    write(source.advance(source.pos + 1))


def _read_escape(source: Source) -> Reading[str]:
    while not (escape := _ESCAPE.match(source.text, source.pos)):
        if not _ESCAPE_BEGUN.fullmatch(source.text, source.pos) or not (yield from source.more()):
            source.advance(source.pos + 1)
            return r"\\"
    return source.advance(escape.end())


def _read_scalar(source: Source, write: Write) -> Reading[None]:
    token = yield from source.token(_SCALAR_CHARS, _LONGEST_SCALAR)
    end = source.pos + len(token)
    # The end of the text may have cut the token, so it cannot be judged.
    if not _SCALAR.fullmatch(token) and not (source.ended and end == len(source.text)):
        raise NotACall
    write(source.advance(end))


def dump(value: Any) -> str:
    """JSON text of a value, characters as they are.

    Raises:
        ValueError: it holds an infinite or undefined number, or is nested too deep.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    # A lone surrogate is a valid string for Python and no valid UTF-8 for the client.
    return _SURROGATE.sub(lambda found: rf"\u{ord(found.group()):04x}", text)


def string_body(text: str) -> str:
    """The text inside a JSON string, without the quotes."""
    return dump(text)[1:-1]


def load(text: str) -> Any:
    """The value of a JSON text; raw control characters in strings are allowed.

    Raises:
        ValueError: it is not JSON, holds NaN or Infinity, or is nested too deep.
    """
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
