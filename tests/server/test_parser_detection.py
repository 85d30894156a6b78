"""Formats by name, guessed from templates, and the fallback for templates without tools.

The templates are our own short ones with the markers of the real ones.
"""

from __future__ import annotations

import json

import pytest

from paceline.errors import ConfigError, RequestError
from paceline.server.parsers.base import ToolCall, new_call_id, parse
from paceline.server.parsers.fallback import describe_tools, messages_for_plain_template
from paceline.server.parsers.registry import (
    Detected,
    create,
    detect,
    opens_reasoning,
    reasoning_parser_names,
    tool_parser_names,
)

LIST = "{%- if tools %}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}{%- endif %}"
TEMPLATES = {
    "qwen3": (
        LIST + r'{{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}'
        "{%- set content = message.content.split('</think>')[-1] %}",
        Detected("hermes", "think", True),
    ),
    "hermes 2 pro": (
        LIST + """{{- "<tool_call>\\n" }}{{- '{"name": <function-name>, "arguments": <args-dict>}\\n' }}""",
        Detected("hermes", None, True),
    ),
    "smollm2": ("{% for message in messages %}{{ message['content'] }}{% endfor %}", Detected(None, None, False)),
    "llama 3": (
        "{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}"
        """{{- 'Respond in the format {"name": function name, "parameters": dictionary of values}.' }}""",
        Detected("llama3_json", None, True),
    ),
    "llama 3 pythonic": (
        LIST + "{{- 'Respond in the format [func_name1(params_name1=params_value1), func_name2(params)] ' }}",
        Detected("pythonic", None, True),
    ),
    "mistral": (LIST + '{{- "[TOOL_CALLS] [" }}', Detected("mistral", None, True)),
    "magistral": (
        LIST + '{{- "[TOOL_CALLS]" + name + "[ARGS]" }}[THINK][/THINK]',
        Detected("mistral", "mistral", True),
    ),
    "granite 3": (
        LIST + "<|start_of_role|>system<|end_of_role|>respond with <|tool_call|> followed by a list of calls"
        "write your thoughts after 'Here is my thought process:'",
        Detected("granite", "granite", True),
    ),
    "qwen3 coder": (
        LIST
        + r"{{- '<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>' }}",
        Detected("qwen3_coder", None, True),
    ),
    "llama 3.1, functions of the user": (
        LIST + """{{- '<function=name>{"parameter": "value"}</function>' }}""",
        Detected(None, None, True),
    ),
    "deepseek r1 distill": (
        "{%- for tool in message['tool_calls'] -%}{{ '<｜tool▁call▁begin｜>' + tool['type'] }}"
        "{{ '<｜tool▁sep｜>' + tool['function']['name'] }}{%- endfor -%}"
        "{{ '<｜Assistant｜><think>\\n' }}",
        Detected("deepseek_v3", "think", False),
    ),
    "phi 4 mini": (
        LIST + 'formatted as functools[{"name": [name], "arguments": [x]}]',
        Detected("phi4_mini", None, True),
    ),
    "glm": (LIST + '<tool_call>{name}\n<arg_key>{"arguments": 1}</arg_key>', Detected(None, None, True)),
    "mentions tools only in text": (
        "{# tools #}{{ 'no tools here' }}{{ message.tools }} tools {{ bos_token }}",
        Detected(None, None, False),
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_detection(name: str) -> None:
    template, expected = TEMPLATES[name]
    assert detect(template, None) == expected


def test_no_template() -> None:
    assert detect(None, "llama") == Detected(None, None, False)


def test_granite_by_model_type() -> None:
    assert detect("<|tool_call|>", "granitemoe").tool == "granite"
    assert detect("<|tool_call|>", "llama").tool is None


def test_detected_names_exist() -> None:
    for _, detected in TEMPLATES.values():
        assert detected.tool in (None, *tool_parser_names())
        assert detected.reasoning in (None, *reasoning_parser_names())


@pytest.mark.parametrize(("tool", "reasoning", "field"), [("x", None, "tool_parser"), (None, "x", "reasoning_parser")])
def test_unknown_names(tool: str | None, reasoning: str | None, field: str) -> None:
    with pytest.raises(ConfigError, match="Known formats") as caught:
        create(tool, reasoning, tools=[], new_id=new_call_id)
    assert caught.value.field == field


def test_prompts_that_open_the_reasoning() -> None:
    assert opens_reasoning("<|assistant|><think>\n", "think")
    assert not opens_reasoning("<|assistant|><think>\n\n</think>\n\n", "think")
    assert not opens_reasoning("<|assistant|><think>\n", None)
    assert not opens_reasoning("<|assistant|>", "think")


TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather {now}", "parameters": {"type": "object"}},
    }
]


def test_description_of_tools() -> None:
    text = describe_tools(TOOLS)
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0]
    assert [json.loads(line) for line in listed.splitlines()] == [TOOLS[0]["function"]]
    example = text.split("<tool_call>\n")[1].split("\n</tool_call>")[0]
    assert json.loads(example).keys() == {"name", "arguments"}


def test_tools_that_are_no_json() -> None:
    with pytest.raises(RequestError) as caught:
        describe_tools([{"function": {"name": "f", "parameters": {"default": float("nan")}}}])
    assert caught.value.field == "tools"


def test_messages_for_plain_templates() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
    broken = {"id": "call_2", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": '}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, broken]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {
            "role": "tool",
            "tool_call_id": "call_2",
            "content": [{"type": "text", "text": "err"}, {"type": "text", "text": "or"}],
        },
        {"role": "assistant", "content": "Sunny.", "tool_calls": []},
    ]
    before = json.dumps(messages)
    plain = messages_for_plain_template(messages)
    assert json.dumps(messages) == before
    assert plain == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": "{\\"city\\": "}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nerror\n</tool_response>",
        },
        {"role": "assistant", "content": "Sunny."},
    ]


def test_fallback_calls_parse_back() -> None:
    call = {"function": {"name": "get_weather", "arguments": '{"city": "</tool_call>"}'}}
    (message,) = messages_for_plain_template([{"role": "assistant", "content": "Let me see.", "tool_calls": [call]}])
    parsed = parse(create("hermes", None, tools=TOOLS, new_id=lambda: "id"), message["content"])
    assert parsed.content == "Let me see.\n"
    assert parsed.tool_calls == (ToolCall("id", "get_weather", '{"city": "</tool_call>"}'),)
