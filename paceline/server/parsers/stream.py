"""Writing events, and running a grammar as a parser."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress

from paceline.server.parsers.base import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart
from paceline.server.parsers.source import Markers, NotACall, Reading, Source, until


class Sink:
    """Collects events; adjacent deltas of one kind are joined."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._kind: Callable[[str], Event] = ContentDelta
        self._pieces: list[str] = []

    def content(self, text: str) -> None:
        """More of the answer."""
        self._add(ContentDelta, text)

    def reasoning(self, text: str) -> None:
        """More of the reasoning."""
        self._add(ReasoningDelta, text)

    def take(self) -> list[Event]:
        """The events since the last call."""
        self._flush()
        events, self._events = self._events, []
        return events

    def end(self) -> None:
        """No more text will come: releases what was held back."""

    def _add(self, kind: Callable[[str], Event], text: str) -> None:
        if kind != self._kind:
            self._flush()
            self._kind = kind
        self._pieces.append(text)

    def _flush(self) -> None:
        if text := "".join(self._pieces):
            self._events.append(self._kind(text))
        self._pieces.clear()


class CallSink(Sink):
    """Collects content and tool calls.

    White space at the start, between calls and after the last one belongs to the markup: it is held back, and dropped
    unless other content follows or there is no call at all.

    Args:
        source: where the grammar reads; committed as calls are written.
        names: the functions that may be called.
        new_id: makes the id of a call.
    """

    def __init__(self, source: Source, names: Collection[str], new_id: Callable[[], str]) -> None:
        super().__init__()
        self._source = source
        self._names = names
        self._new_id = new_id
        self._calls = 0
        self._space: list[str] | None = []
        """White space held back; None while content runs."""

    def content(self, text: str) -> None:
        if self._space is not None and text:
            self._space.append(text)
            if text.isspace():
                return
            text = "".join(self._space)
            self._space = None
        super().content(text)

    def known(self, name: str) -> str:
        """The name itself.

        Raises:
            NotACall: the request has no such function.
        """
        if name not in self._names:
            raise NotACall
        return name

    def start(self, name: str) -> None:
        """A call begins. All that was consumed so far is its markup; arguments must follow at once."""
        self._flush()
        self._space = []
        self._events.append(ToolCallStart(self._calls, self._new_id(), name))
        self._calls += 1
        self._source.commit()

    def arguments(self, text: str) -> None:
        """More arguments of the call that was started last; they stand for all that was consumed so far."""
        self._add(self._argument_delta, text)
        self._source.commit()

    def end(self) -> None:
        if self._space and not self._calls:
            super().content("".join(self._space))

    def _argument_delta(self, text: str) -> Event:
        return ToolCallArguments(self._calls - 1, text)


class StreamParser:
    """Runs a grammar as an `OutputParser`. The grammar must read to the end of the text."""

    def __init__(self, source: Source, sink: Sink, reading: Reading[None]) -> None:
        self._source = source
        self._sink = sink
        self._reading = reading
        next(reading)

    def push(self, text: str) -> list[Event]:
        if text:
            self._source.add(text)
            next(self._reading)
        return self._sink.take()

    def finish(self) -> list[Event]:
        self._source.ended = True
        for _ in self._reading:
            raise AssertionError("a grammar waits for text after the end")
        self._sink.end()
        return self._sink.take()


def attempt(source: Source, sink: CallSink, calls: Reading[None]) -> Reading[None]:
    """Reads calls; what they consume and do not account for is content."""
    with suppress(NotACall):
        yield from calls
    sink.content(source.take_back())


def marked_calls(
    source: Source, sink: CallSink, markers: Markers, calls: Callable[[str], Reading[None]]
) -> Reading[None]:
    """Content with calls in it, each behind a marker. `calls` reads on behind the marker it is given."""
    while (marker := (yield from until(source, markers, sink.content))) is not None:
        yield from attempt(source, sink, calls(marker))


def closing(source: Source, *literals: str) -> Reading[None]:
    """The end of a call's markup: white space and one of the literals, if they are there."""
    yield from source.space()
    for literal in literals:
        if (yield from source.accept(literal, cut_off=True)):
            source.commit()
            return
