"""The parser that does nothing, and parsers one after another."""

from __future__ import annotations

from paceline.server.parsers.base import ContentDelta, Event, OutputParser


class PlainParser:
    """All text is content."""

    def push(self, text: str) -> list[Event]:
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class ChainedParser:
    """A reasoning parser first; the content it finds goes through a second parser."""

    def __init__(self, first: OutputParser, second: OutputParser) -> None:
        self._first = first
        self._second = second

    def push(self, text: str) -> list[Event]:
        return self._hand_on(self._first.push(text))

    def finish(self) -> list[Event]:
        return [*self._hand_on(self._first.finish()), *self._second.finish()]

    def _hand_on(self, events: list[Event]) -> list[Event]:
        out: list[Event] = []
        for event in events:
            if isinstance(event, ContentDelta):
                out.extend(self._second.push(event.text))
            else:
                out.append(event)
        return out
