"""Reading text that arrives in pieces as if it were there at once.

A *grammar* is a generator over a `Source`: where it needs text that has not arrived it yields, and goes on when there
is more, or the end. It looks ahead by at most one literal or short token and never goes back over what it has
consumed, so time is linear in the text, whatever the text is.

    committed        consumed            ahead
    ──────────────┼───────────────────┼──────────────▶
                mark                 pos

Text before the mark has become events or was recognised as markup. When a grammar raises `NotACall`, the text between
mark and position is content, and reading goes on at the position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Reads from a source; yields while it waits for text; returns a T."""
Write = Callable[[str], None]

_SPACE = re.compile(r"[ \t\r\n]+")
_WORD = re.compile(r"[A-Za-z0-9_.\-]*")
_LONGEST_WORD = 256
"""Characters. OpenAI allows 64 in a function name; a longer word is no name."""


def ignore(_text: str) -> None:
    """Writes nowhere."""


class NotACall(Exception):
    """The text is not of the expected form from the source's position on."""


class Source:
    """Text that arrives in pieces. Only `StreamParser` adds; only grammars read."""

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.ended = False
        self._mark = 0
        self._kept: list[str] = []

    def add(self, piece: str) -> None:
        """More text; what has been consumed is dropped, or kept aside while it is not committed."""
        if self._mark < self.pos:
            self._kept.append(self.text[self._mark : self.pos])
        self.text = self.text[self.pos :] + piece if self.pos < len(self.text) else piece
        self.pos = self._mark = 0

    def more(self) -> Reading[bool]:
        """Waits for more text. False: there will be none."""
        if self.ended:
            return False
        yield
        return not self.ended

    def advance(self, end: int) -> str:
        """Consumes the text up to index `end` and returns it."""
        taken = self.text[self.pos : end]
        self.pos = end
        return taken

    def commit(self) -> None:
        """What has been consumed is accounted for and cannot be taken back."""
        self._mark = self.pos
        if self._kept:
            self._kept = []

    def take_back(self) -> str:
        """What has been consumed since the last commit; committed by this."""
        taken = "".join(self._kept) + self.text[self._mark : self.pos]
        self.commit()
        return taken

    @property
    def here(self) -> str:
        """The next character if it has arrived, else ""."""
        return self.text[self.pos : self.pos + 1]

    def peek(self) -> Reading[str]:
        """The next character, or "" at the end."""
        if self.pos == len(self.text):
            yield from self.more()
        return self.here

    def accept(self, literal: str, *, cut_off: bool = False) -> Reading[bool]:
        """Consumes the literal if it comes next. With `cut_off`, its beginning is enough at the end of the text."""
        while not self.text.startswith(literal, self.pos):
            begun = self.text[self.pos : self.pos + len(literal)]
            if not literal.startswith(begun):
                return False
            if not (yield from self.more()):
                if begun and cut_off:
                    self.pos = len(self.text)
                return bool(begun) and cut_off
        self.pos += len(literal)
        return True

    def expect(self, literal: str) -> Reading[None]:
        """Consumes the literal.

        Raises:
            NotACall: something else comes next.
        """
        if not (yield from self.accept(literal)):
            raise NotACall

    def space(self, write: Write = ignore) -> Reading[None]:
        """Consumes and writes the white space that comes next."""
        while True:
            if found := _SPACE.match(self.text, self.pos):
                write(self.advance(found.end()))
            elif self.here or not (yield from self.more()):
                return

    def token(self, pattern: re.Pattern[str], longest: int) -> Reading[str]:
        """The run of a pattern `[set]*` that comes next; it is not consumed.

        Raises:
            NotACall: it is empty or longer than `longest` characters.
        """
        while True:
            found = pattern.match(self.text, self.pos)
            size = (found.end() if found else self.pos) - self.pos
            if size > longest:
                raise NotACall
            if self.pos + size < len(self.text) or not (yield from self.more()):
                break
        if size == 0:
            raise NotACall
        return self.text[self.pos : self.pos + size]

    def word(self) -> Reading[str]:
        """Consumes a function name or another short identifier.

        Raises:
            NotACall: there is none.
        """
        word = yield from self.token(_WORD, _LONGEST_WORD)
        self.pos += len(word)
        return word


class Markers:
    """Literals to look for, and their beginnings at the end of what has arrived."""

    def __init__(self, *literals: str) -> None:
        whole = "|".join(re.escape(literal) for literal in literals)
        begun = "|".join(_beginnings(literal) for literal in literals)
        self.pattern = re.compile(rf"({whole})|(?:{begun})\Z")


def _beginnings(literal: str) -> str:
    """A pattern of the proper beginnings of a literal, longest first: `a(?:b(?:c)?)?` for "abcd"."""
    pattern = ""
    for char in reversed(literal[:-1]):
        pattern = re.escape(char) + (f"(?:{pattern})?" if pattern else "")
    return pattern or "(?!)"


def until(source: Source, markers: Markers, write: Write) -> Reading[str | None]:
    """Writes and commits all text before the next marker, consumes the marker and returns it; None at the end."""
    search = markers.pattern.search
    while True:
        found = search(source.text, source.pos)
        whole = bool(found and found.lastindex)
        stop = found.start() if found and (whole or not source.ended) else len(source.text)
        if stop > source.pos:
            write(source.advance(stop))
        source.commit()
        if found and whole:
            return source.advance(found.end())
        if source.ended:
            return None
        yield


def rest(source: Source, write: Write) -> Reading[None]:
    """Writes all text that is still to come."""
    while True:
        if source.pos < len(source.text):
            write(source.advance(len(source.text)))
            source.commit()
        if source.ended:
            return
        yield
