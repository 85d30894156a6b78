"""Reasoning before the answer."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.server.parsers.source import Markers, Reading, Source, rest, until
from paceline.server.parsers.stream import Sink


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Markers around the reasoning; there may be spellings of each."""

    begin: tuple[str, ...]
    end: tuple[str, ...]


THINK = ReasoningFormat(("<think>",), ("</think>",))
"""DeepSeek R1, Qwen 3, QwQ, SmolLM3 and others."""
MISTRAL = ReasoningFormat(("[THINK]",), ("[/THINK]",))
"""Magistral."""
GRANITE = ReasoningFormat(
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
)
"""Granite 3.2."""


def read_reasoning(source: Source, sink: Sink, form: ReasoningFormat, starts_open: bool) -> Reading[None]:
    """Reasoning at the start of the text, then content.

    A marker later in the text is not one: the answer may well speak of it. White space around the markers and the
    reasoning is markup.

    Args:
        starts_open: the prompt has opened the reasoning, so all is reasoning up to the end marker. The begin marker
            may still be repeated.
    """
    yield from source.space()
    opened = False
    for begin in form.begin:
        opened = opened or (yield from source.accept(begin))
    if opened or starts_open:
        yield from source.space()
        source.commit()
        trimmed = _Trimmed(sink)
        if (yield from until(source, Markers(*form.end), trimmed.write)) is None:
            trimmed.release()
        yield from source.space()
        source.commit()
    else:
        sink.content(source.take_back())
    yield from rest(source, sink.content)


class _Trimmed:
    """Writes reasoning without the white space at its end."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._space: list[str] = []

    def write(self, text: str) -> None:
        body = text.rstrip()
        if body:
            self.release()
            self._sink.reasoning(body)
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def release(self) -> None:
        """Writes the white space after all."""
        self._sink.reasoning("".join(self._space))
        self._space.clear()
