"""One sample of a chat completion in the making: its text through the parsers, into pieces of a chunk and a message."""

from __future__ import annotations

from typing import Any

from paceline.engine.request import FinishReason, Request
from paceline.engine.types import RequestOutput, TokenLogprobs
from paceline.server.parsers.base import (
    ContentDelta,
    Event,
    OutputParser,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from paceline.server.protocol.chat import (
    AnsweredToolCall,
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChoiceLogprobs,
)
from paceline.server.tokens import TokenTexts


class ChatChoiceState:
    """One sample: its parser, and everything said so far.

    Args:
        request: the engine's.
        parser: turns text into content, reasoning and tool calls.
        tokens: token texts, for log-probabilities.
        with_ids: whether token ids are reported.
        calls_only: a call was demanded, so other text is only what `max_tokens` left of a call.
    """

    def __init__(
        self, request: Request, parser: OutputParser, tokens: TokenTexts, *, with_ids: bool, calls_only: bool
    ) -> None:
        self.request = request
        self.reasoning_tokens = 0
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, dict[str, Any]] = {}
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self._parser = parser
        self._tokens = tokens
        self._with_ids = with_ids
        self._calls_only = calls_only
        self._begun = False

    def add(self, news: RequestOutput) -> dict[str, Any] | None:
        """Take news in; the choice of a chunk."""
        events = self._parse(news)
        delta = self._delta(events)
        self.logprobs.extend(news.logprobs)
        if news.finish_reason is not None:
            stopped = news.finish_reason is FinishReason.STOP
            self.finish_reason = "tool_calls" if stopped and self.calls else news.finish_reason.value
        if not (delta or news.logprobs or self.finish_reason or (self._with_ids and news.token_ids)):
            return None
        if not self._begun:
            self._begun = True
            delta = {
                "role": "assistant",
                **({} if self._calls_only or "tool_calls" in delta else {"content": ""}),
                **delta,
            }
        logprobs = {"content": [c.model_dump() for c in self._tokens.content(news.logprobs)], "refusal": None}
        choice = {
            "index": self.request.sample_index,
            "delta": delta,
            "logprobs": logprobs if self.request.params.logprobs is not None else None,
            "finish_reason": self.finish_reason,
        }
        return {**choice, "token_ids": list(news.token_ids)} if self._with_ids else choice

    def _parse(self, news: RequestOutput) -> list[Event]:
        events: list[Event] = []
        for piece in news.pieces:
            found = self._parser.push(piece) if piece else []
            if found and all(isinstance(event, ReasoningDelta) for event in found):
                self.reasoning_tokens += 1
            events += found
        if news.finish_reason is not None:
            events += self._parser.finish()
        return events

    def _delta(self, events: list[Event]) -> dict[str, Any]:
        """What the events add, remembered and in a chunk's form."""
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, ContentDelta):
                if self._calls_only:
                    continue
                self.content.append(event.text)
                delta["content"] = delta.get("content", "") + event.text
            elif isinstance(event, ReasoningDelta):
                self.reasoning.append(event.text)
                delta["reasoning_content"] = delta.get("reasoning_content", "") + event.text
            elif isinstance(event, ToolCallStart):
                self.calls[event.index] = {"id": event.id, "name": event.name, "arguments": []}
                function = {"name": event.name, "arguments": ""}
                calls[event.index] = {"index": event.index, "id": event.id, "type": "function", "function": function}
            elif isinstance(event, ToolCallArguments):
                self.calls[event.index]["arguments"].append(event.text)
                call = calls.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def choice(self) -> ChatChoice:
        """The finished choice."""
        content = "".join(self.content)
        calls = [
            AnsweredToolCall(
                id=call["id"], function=CalledFunction(name=call["name"], arguments="".join(call["arguments"]))
            )
            for _, call in sorted(self.calls.items())
        ]
        wanted = self.request.params.logprobs is not None
        return ChatChoice(
            index=self.request.sample_index,
            message=AnswerMessage(
                content=None if (calls or self._calls_only) and not content else content,
                reasoning_content="".join(self.reasoning) or None,
                tool_calls=calls or None,
            ),
            logprobs=ChoiceLogprobs(content=self._tokens.content(self.logprobs)) if wanted else None,
            finish_reason=self.finish_reason,  # type: ignore[arg-type]
            token_ids=self.request.output_ids if self._with_ids else None,
        )
