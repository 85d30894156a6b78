"""Guesses a model's output formats from its chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EXPRESSION = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_TOOLS_VARIABLE = re.compile(r"(?<![\w.])tools\b")
_JSON_CALL = re.compile(r'\\?"arguments\\?":')
"""A member of a JSON call, as written in text or inside a quoted string."""


@dataclass(frozen=True, slots=True)
class Detected:
    """What a template tells about its model; None where it tells nothing we know."""

    tool: str | None
    """Format of tool calls."""
    reasoning: str | None
    """Format of the reasoning."""
    template_knows_tools: bool
    """The template renders the request's tools. If not, `fallback` describes them in a message, and the model is asked
    for calls in the format `hermes`, whatever `tool` says."""


def detect(chat_template: str | None, model_type: str | None) -> Detected:
    """The formats whose markers a chat template contains.

    Args:
        chat_template: Jinja text.
        model_type: of the checkpoint's config, such as "granite".
    """
    if chat_template is None:
        return Detected(None, None, False)
    template = _COMMENT.sub("", chat_template)
    return Detected(_tool_format(template, model_type or ""), _reasoning_format(template), _uses_tools(template))


def _tool_format(template: str, model_type: str) -> str | None:
    """The order matters: later formats are told by markers that earlier ones have too."""
    if "<｜tool▁sep｜>" in template:
        return "deepseek_v3"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if "functools[" in template or ("<|tool_call|>" in template and "<|/tool_call|>" in template):
        return "phi4_mini"
    if "<|tool_call|>" in template and ("<|start_of_role|>" in template or model_type.startswith("granite")):
        return "granite"
    # GLM writes <tool_call> with another content.
    if "<tool_call>" in template and "<arg_key>" not in template and _JSON_CALL.search(template):
        return "hermes"
    if re.search(r"\[func_name1\(\w+=", template):
        return "pythonic"
    if re.search(r'\{\\?"name\\?": function name, \\?"parameters\\?": dictionary', template):
        return "llama3_json"
    return None


def _reasoning_format(template: str) -> str | None:
    if "Here is my thought process:" in template:
        return "granite"
    if "[THINK]" in template:
        return "mistral"
    return "think" if "</think>" in template or "<think>" in template else None


def _uses_tools(template: str) -> bool:
    """Whether the variable `tools` is read anywhere outside of quoted text."""
    return any(_TOOLS_VARIABLE.search(_QUOTED.sub("", code)) for code in _EXPRESSION.findall(template))
