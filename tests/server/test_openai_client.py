"""The official `openai` client against a running server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest

pytest.importorskip("openai")

import openai
from pydantic import BaseModel, Field
from server_tools import END, Running, make_byte_loaded, make_byte_tokenizer, serving

KEY = "sk-correct"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with a key, and with room for the description of tools."""
    loaded = make_byte_loaded(max_position_embeddings=2048)
    with serving(loaded, api_key=KEY, engine={"speculation": "prediction:k=4"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    """A client of it that does not hide errors by trying again."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


NO_SPACE = {str(make_byte_tokenizer().encode(space)[0]): -100 for space in " \t\r\n"}
"""Keeps a random model from writing nothing but white space, which JSON allows between any two parts."""


class Mood(BaseModel):
    """What the tests ask for: every value has few texts, so that a random model finishes."""

    colour: Literal["red", "naïve blue", "€"]
    sure: bool
    tags: list[Literal["a", "b"]] = Field(max_length=2)


class Weather(BaseModel):
    """Look up the weather."""

    place: Literal["Oslo", "東京"]
    days: Literal[1, 23]


def test_models(client: Any) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=12, seed=5, n=2, user="me", store=False, metadata={"a": "b"}
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.role == "assistant" and choice.message.content for choice in answer.choices)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint.startswith("paceline-")
    assert answer.seed == 5


def test_the_reported_seed_gives_the_text_again(client: Any) -> None:
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 12}
    first = client.chat.completions.create(**options)
    assert 0 <= first.seed < 2**53  # what JavaScript reads exactly
    again = client.chat.completions.create(**options, seed=first.seed)
    assert again.choices[0].message.content == first.choices[0].message.content


def test_every_kind_of_message(client: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "Weather", "arguments": '{"place": "Oslo"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}],
            "name": "al",
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "refusal": None},
        {"role": "user", "content": "Go on."},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert answer.usage.completion_tokens <= 4


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # the client's own models
def test_an_answer_can_be_sent_back(client: Any) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "logit_bias": NO_SPACE, "seed": 1}
    demand = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    parsed = client.chat.completions.parse(**options, **demand).choices[0].message
    with client.chat.completions.stream(**options, **demand) as stream:
        streamed = stream.get_final_completion().choices[0].message
    typed = client.chat.completions.parse(**options, response_format=Mood).choices[0].message
    for message in (parsed, streamed):
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
        options |= {"messages": [*HELLO, message, result, typed, HELLO[0]], "max_tokens": 4}
        assert client.chat.completions.create(**options, tools=tools).choices


def test_stream(client: Any) -> None:
    # The client's own helper takes an answer that was cut short for an error, so this one must end by itself.
    ending: Any = {"structured_outputs": {"regex": "[a-d€]{12}"}}
    options = {"model": "tiny", "messages": HELLO, "seed": 5, "max_tokens": 40, "extra_body": ending}
    options |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage.completion_tokens == whole.usage.completion_tokens
    tokens = whole.choices[0].logprobs.content
    assert [token.token for token in final.choices[0].logprobs.content] == [token.token for token in tokens]
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
    assert (
        b"".join(bytes(token.bytes) for token in tokens if token.token != END).decode()
        == whole.choices[0].message.content
    )


def test_structured_output(client: Any) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny", messages=HELLO, response_format=Mood, seed=seed, max_completion_tokens=120
        )
        assert isinstance(answer.choices[0].message.parsed, Mood)
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, response_format=Mood, seed=2, max_completion_tokens=120
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


def test_an_unfinished_structure_is_an_error_of_the_client(client: Any) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Mood, max_completion_tokens=3)


def test_tools(client: Any) -> None:
    tools = [openai.pydantic_function_tool(Weather, name="weather"), openai.pydantic_function_tool(Mood, name="mood")]
    named: Any = {"type": "function", "function": {"name": "weather"}}
    options = {"model": "tiny", "messages": HELLO, "tools": tools, "tool_choice": named, "max_tokens": 300, "seed": 1}
    options["logit_bias"] = NO_SPACE
    answer = client.chat.completions.parse(**options)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**options) as stream:
        events = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert [event.parsed_arguments for event in events] == [call.function.parsed_arguments]
    assert streamed.function.arguments == call.function.arguments
    none = client.chat.completions.create(**{**options, "tool_choice": "none", "max_tokens": 5})
    assert none.choices[0].message.tool_calls is None


def test_prediction(client: Any) -> None:
    options = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 40}
    plain = client.chat.completions.create(**options)
    text = plain.choices[0].message.content
    prediction: Any = {"type": "content", "content": text}
    helped = client.chat.completions.create(**options, prediction=prediction)
    assert helped.choices[0].message.content == text
    assert helped.usage.completion_tokens_details.accepted_prediction_tokens > 0
    prediction["content"] = [{"type": "text", "text": "something else entirely"}]
    misled = client.chat.completions.create(**options, prediction=prediction)
    assert misled.choices[0].message.content == text
    assert misled.usage.completion_tokens_details.rejected_prediction_tokens > 0
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0


def test_extra_fields(client: Any) -> None:
    options = {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 30}
    greedy = client.chat.completions.create(**options, temperature=0)
    extra = {"top_k": 1, "speculation": {"metrics": True, "cap": 2}}
    capped = client.chat.completions.create(**options, temperature=1, extra_body=extra)
    assert capped.choices[0].message.content == greedy.choices[0].message.content
    numbers = capped.metrics["speculative_decoding"]
    assert numbers["num_spec_tokens"] <= 2
    assert len(numbers["acceptance_histogram"]) == numbers["num_spec_tokens"] + 1
    off = client.chat.completions.create(**options, extra_body={"speculation": {"off": True, "metrics": True}})
    assert off.metrics["speculative_decoding"]["num_draft_tokens"] == 0
    chosen = client.chat.completions.create(**options, extra_body={"structured_outputs": {"choice": ["é!"]}})
    assert chosen.choices[0].message.content == "é!"


def test_text_completions(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=["the ", "and €"], n=2, max_tokens=5, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    scored = client.completions.create(model="tiny", prompt="the and", max_tokens=3, echo=True, logprobs=2, seed=1)
    logprobs = scored.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.text_offset) == scored.usage.total_tokens
    stream = client.completions.create(model="tiny", prompt="the and", max_tokens=3, echo=True, seed=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == scored.choices[0].text


def test_async_client_that_leaves_early(server: Running) -> None:
    async def leave() -> int:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, stream=True, max_tokens=400, extra_body={"ignore_eos": True}
            )
            seen = 0
            async with stream:
                async for _ in stream:
                    seen += 1
                    if seen == 3:
                        return seen
        raise AssertionError("the stream ended by itself")

    assert asyncio.run(leave()) == 3
    server.wait_idle()


def test_request_id_comes_back(client: Any) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.parse()._request_id == "mine-1"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temprature": 1}, "temprature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 99}, "n"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"web_search_options": {}}, "web_search_options"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_requests(client: Any, options: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1, **options}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{k: body.pop(k) for k in ("model", "messages")}, extra_body=body)
    assert error.value.type == "invalid_request_error"
    assert param in error.value.param
    assert error.value.code in ("invalid_value", "context_length_exceeded")


def test_keys_and_models(server: Running, client: Any) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="huge", messages=HELLO)
    assert error.value.code == "model_not_found"


def test_a_busy_server_is_asked_again(server: Running, client: Any) -> None:
    admission = server.service.admission
    limit, admission.limit = admission.limit, 0
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert error.value.status_code == 503
    assert error.value.response.headers["retry-after"] == "1"
    threading.Timer(0.3, lambda: setattr(admission, "limit", limit)).start()
    answer = client.with_options(max_retries=2).chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert answer.choices
