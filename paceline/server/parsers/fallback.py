"""Tools for models whose chat template has no place for them: plain messages in the style of Hermes.

The model is told about the functions in a system message, its calls are the text `<tool_call>...</tool_call>`, and the
results come back in a user message as `<tool_response>...</tool_response>`. The parser to use is `hermes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paceline.errors import RequestError
from paceline.server.parsers.json_text import dump, load

_INSTRUCTIONS = """\
# Functions

You can call the functions listed here, one JSON object per line:
<tools>
{functions}
</tools>

To call a function, write nothing but this, with the name of the function and its arguments filled in:
<tool_call>
{{"name": "function_name", "arguments": {{"argument_name": "value"}}}}
</tool_call>
Use one such block per call. The result will be given to you between <tool_response> and </tool_response>. If no \
function helps, answer in your own words."""


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Text for the system message that lists the functions and says how to call one.

    Raises:
        RequestError: a function cannot be written as JSON.
    """
    try:
        functions = [dump(tool["function"]) for tool in tools if tool.get("function")]
    except ValueError as error:
        raise RequestError(
            f"a function is not valid JSON: {error}.", field="tools", fix="Use finite numbers and less nesting."
        ) from error
    return _INSTRUCTIONS.format(functions="\n".join(functions))


def messages_for_plain_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation without `tool_calls` and without messages of the role `tool`.

    Calls are appended to the text of the assistant; results that follow one another become one message of the user,
    since many templates insist on alternating roles. Other messages are passed on as they are.
    """
    plain: list[dict[str, Any]] = []
    in_results = False
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
            if in_results:
                plain[-1]["content"] += "\n" + result
            else:
                plain.append({"role": "user", "content": result})
            in_results = True
            continue
        in_results = False
        copy = dict(message)
        if calls := copy.pop("tool_calls", None):
            parts = [_text(copy.get("content")), *(_call(call["function"]) for call in calls)]
            copy["content"] = "\n".join(part for part in parts if part)
        plain.append(copy)
    return plain


def _call(function: Mapping[str, Any]) -> str:
    given = function.get("arguments") or "{}"
    try:
        arguments = dump(load(given) if isinstance(given, str) else given)
    except ValueError:
        # What a model once broke is best shown as it was.
        arguments = dump(str(given))
    return f'<tool_call>\n{{"name": {dump(function["name"])}, "arguments": {arguments}}}\n</tool_call>'


def _text(content: Any) -> str:
    """The text of a message's content: a string, a list of parts, or nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content)
