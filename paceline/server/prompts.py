"""Conversations to text, through the model's own chat template; users never supply templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.errors import RequestError
from paceline.server.parsers.fallback import describe_tools, messages_for_plain_template
from paceline.server.protocol.chat import Message, Tool


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's template.

    Args:
        tokenizer: a `transformers` tokenizer.
        model_name: for error messages.
        knows_tools: whether the template has a place for tools; otherwise they are described in a system message.
    """

    tokenizer: Any
    model_name: str
    knows_tools: bool

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt's text.

        Raises:
            RequestError: there is no template, or it rejects the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(f"{self.model_name} has no chat template.", field="messages", fix="Use /v1/completions.")
        plain = [_as_dict(i, message) for i, message in enumerate(messages)]
        shown = [tool.model_dump(exclude_none=True) for tool in tools]
        if not self.knows_tools:
            plain = messages_for_plain_template(plain)
            if shown:
                plain = _with_system(plain, describe_tools(shown))
                shown = []
        try:
            text = self.tokenizer.apply_chat_template(
                plain,
                tools=shown or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
        except Exception as error:
            raise RequestError(f"the chat template rejects them ({type(error).__name__}).", field="messages") from error
        return str(text)


def _as_dict(index: int, message: Message) -> dict[str, Any]:
    """The message as templates expect it: text content, arguments as objects, `developer` as `system`."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": message.text()}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"messages.{index}.tool_calls.{i}"),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return plain


def _arguments(text: str, field: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError("is not JSON.", field=f"{field}.function.arguments") from error
    if not isinstance(arguments, dict):
        raise RequestError("must be a JSON object.", field=f"{field}.function.arguments")
    return arguments


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
