"""`langchain-openai` against a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import pytest

pytest.importorskip("langchain_openai")

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from server_tools import Running, make_byte_loaded, make_byte_tokenizer, serving

NO_SPACE = {str(make_byte_tokenizer().encode(space)[0]): -100 for space in " \t\r\n"}
"""Keeps a random model from writing nothing but white space, which JSON allows between any two parts."""


class Mood(BaseModel):
    """Tell a mood."""

    colour: Literal["red", "naïve blue", "€"]
    sure: bool


@tool
def weather(place: Literal["Oslo", "東京"]) -> str:
    """Look up the weather."""
    return f"rain in {place}"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with room for the description of tools."""
    with serving(make_byte_loaded(max_position_embeddings=2048)) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")


def chat_model(server: Running, **options: Any) -> ChatOpenAI:
    """A chat model of that server."""
    fixed: dict[str, Any] = {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": "any", "max_retries": 0}
    return ChatOpenAI(**{**fixed, "max_tokens": 20, "seed": 5, "temperature": 0.8, **options})


def test_invoke_and_stream(server: Running) -> None:
    model = chat_model(server, stop=["zzz"], frequency_penalty=0.1, presence_penalty=0.1, top_p=0.9)
    messages = [SystemMessage("Be brief."), HumanMessage("hello")]
    whole = model.invoke(messages)
    assert whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] <= 20
    assert whole.response_metadata["model_name"] == "tiny"
    chunks = list(model.stream(messages, stream_usage=True))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.content == whole.content
    assert total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


def test_batch_and_async(server: Running) -> None:
    model = chat_model(server, temperature=0)
    answers = model.batch(["hello", "the sea", "hello"])
    assert answers[0].content == answers[2].content
    assert asyncio.run(model.ainvoke("hello")).content == answers[0].content


def test_logprobs_and_extra_fields(server: Running) -> None:
    extra = {"top_k": 3, "speculation": {"metrics": True, "off": True}}
    answer = chat_model(server, logprobs=True, top_logprobs=2, extra_body=extra).invoke("hello")
    tokens = answer.response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


@pytest.mark.parametrize("choice", ["weather", "any", "auto", None])
def test_tools(server: Running, choice: str | None) -> None:
    model = chat_model(server, max_tokens=200, logit_bias=NO_SPACE)
    bound = model.bind_tools([weather], tool_choice=choice, parallel_tool_calls=False)
    answer = bound.invoke("hello")
    assert isinstance(answer, AIMessage)
    if choice not in ("weather", "any"):
        return
    [call] = answer.tool_calls
    assert call["name"] == "weather"
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert bound.bind(max_tokens=2, tool_choice="none").invoke([HumanMessage("hello"), answer, result])
    total: Any = None
    for chunk in bound.stream("hello"):
        total = chunk if total is None else total + chunk
    assert [c["args"] for c in total.tool_calls] == [call["args"]]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # the client's own models
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [Mood, Mood.model_json_schema()], ids=["class", "schema"])
def test_structured_output(server: Running, method: Any, schema: Any) -> None:
    model = chat_model(server, max_tokens=200, logit_bias=NO_SPACE).with_structured_output(schema, method=method)
    answer = model.invoke("hello")
    Mood.model_validate(answer if isinstance(answer, dict) else answer.model_dump())
    last = list(model.stream("hello"))[-1]
    assert last == answer


def test_json_mode(server: Running) -> None:
    closing = {str(make_byte_tokenizer().encode("}")[0]): 100}  # a random model hardly ever ends an object by itself
    model = chat_model(server, logit_bias=closing)
    assert model.with_structured_output(None, method="json_mode").invoke("hello") == {}


def test_text_completions(server: Running) -> None:
    model = OpenAI(model="tiny", base_url=f"{server.url}/v1", api_key="any", max_tokens=9, seed=3, temperature=0.7)
    whole = model.invoke("the sea")
    assert "".join(model.stream("the sea")) == whole
    assert len(model.generate(["the sea", "the sky"]).generations) == 2
