"""What a parser gives: events, and the message they add up to."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More text of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call of a known function begins; `index` counts the calls of this answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the JSON object that the call `index` is given."""

    index: int
    text: str


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


class OutputParser(Protocol):
    """Splits generated text into events while it arrives.

    The events, adjacent deltas joined, do not depend on how the text was cut into pieces. Text that is not a valid call
    comes back verbatim as content. What is held back is the least that may still turn into something else: the
    beginning of a marker, or of a call whose name is not known yet.

    A call whose arguments break off (the generation ends, or the text is not JSON any more) has already been announced
    and keeps what it got. That is never complete JSON, so no client runs it by mistake; the text from the break on is
    content.
    """

    def push(self, text: str) -> list[Event]:
        """The next piece of generated text, of any length."""
        ...

    def finish(self) -> list[Event]:
        """The generation has ended; releases what was held back. Nothing may be pushed afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function with its arguments as JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """A whole answer. Absent parts are None."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


def parse(parser: OutputParser, text: str) -> ParsedMessage:
    """The message of a whole text: exactly what its events add up to."""
    return collect([*parser.push(text), *parser.finish()])


def collect(events: Iterable[Event]) -> ParsedMessage:
    """The message that the events of one answer add up to."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[ToolCallStart, list[str]]] = []
    for event in events:
        match event:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCallStart():
                calls.append((event, []))
            case ToolCallArguments(index, text):
                calls[index][1].append(text)
    return ParsedMessage(
        "".join(content) or None,
        "".join(reasoning) or None,
        tuple(ToolCall(start.id, start.name, "".join(pieces)) for start, pieces in calls),
    )


def new_call_id() -> str:
    """A fresh id of a tool call: `call_` and 24 random hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"
