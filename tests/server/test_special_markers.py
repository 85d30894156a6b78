"""Markers of tool calls and reasoning that are special tokens of the tokenizer reach the parsers all the same."""

from __future__ import annotations

import json
from typing import Any

from server_tools import TEMPLATE, make_byte_loaded, serving
from tokenizers import AddedToken

from paceline.engine.detokenizer import Detokenizer

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
TEMPLATE_WITH_TOOLS = '{% if tools %}{# #}{{ tools | tojson }}<tool_call>{"arguments": {}}{% endif %}' + TEMPLATE


def loaded_with_markers() -> Any:
    loaded = make_byte_loaded(template=TEMPLATE_WITH_TOOLS)
    loaded.tokenizer.backend_tokenizer.add_special_tokens([AddedToken(m, special=True) for m in MARKERS])
    return loaded


def test_a_forced_call_through_special_tokens() -> None:
    loaded = loaded_with_markers()
    body = {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "tool_choice": "required", "seed": 1}
    with serving(loaded) as running:
        assert len(running.service.markers) == len(MARKERS)
        begin = loaded.tokenizer.convert_tokens_to_ids("<tool_call>")
        options = {"logit_bias": {str(begin): 100}, "return_token_ids": True}
        answer = running.post("/v1/chat/completions", {**body, **options}).json()
    (choice,) = answer["choices"]
    assert choice["token_ids"][0] == begin
    call = choice["message"]["tool_calls"][0]["function"]
    assert call["name"] == "f"
    assert json.loads(call["arguments"]) == {}
    assert choice["message"]["content"] is None


def test_only_visible_special_tokens_stay() -> None:
    tokenizer = loaded_with_markers().tokenizer
    ids = tokenizer.encode("a<tool_call>b<|im_start|>c</tool_call>\u20ac")
    seen = [tokenizer.convert_tokens_to_ids(m) for m in MARKERS]
    for visible, text in ((seen, "a<tool_call>bc</tool_call>\u20ac"), ((), "abc\u20ac")):
        decoder = Detokenizer(tokenizer, visible=visible)
        pieces = [decoder.push(token)[0] for token in ids]
        assert "".join(pieces) + decoder.flush(ids) == text
