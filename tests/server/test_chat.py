"""Chat completions: the answer is what the engine gives offline, in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_tools import Running, events, make_byte_loaded, serving

from paceline import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "the and the and the"}]
BODY: dict[str, Any] = {"messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0.8, "seed": 7}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def offline() -> LLM:
    return LLM(make_byte_loaded(), speculation="none", kv_cache_memory=8 << 20)


def offline_text(llm: LLM, **options: Any) -> str:
    return llm.chat(MESSAGES, SamplingParams(**{"max_tokens": 24, "temperature": 0.8, "seed": 7, **options}))[0].text


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ({}, {}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.01}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}),
        ({"top_k": -1}, {}),
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"logit_bias": {"262": 8, "5": -100}}, {"logit_bias": {262: 8.0, 5: -100.0}}),
        ({"stop": "e"}, {"stop": ("e",)}),
        ({"stop": ["zz", " the"], "min_tokens": 3}, {"stop": ("zz", " the"), "min_tokens": 3}),
        ({"ignore_eos": True, "stop_token_ids": [262]}, {"ignore_eos": True, "stop_token_ids": (262,)}),
        ({"seed": -3}, {"seed": 2**64 - 3}),
        ({"max_completion_tokens": None, "max_tokens": 5}, {"max_tokens": 5}),
        ({"prediction": {"type": "content", "content": " the and"}}, {}),
        ({"speculation": {"off": True}}, {}),
        ({"speculation": "off"}, {}),
        ({"speculation": {"cap": 2, "drafters": ["suffix"]}}, {}),
    ],
)
def test_same_text_as_offline(server: Running, offline: LLM, extra: dict[str, Any], options: dict[str, Any]) -> None:
    """Speculation is on in the server and off in the reference: the text must not know."""
    answer = server.post(CHAT, {**BODY, **extra})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == offline_text(offline, **options)


def test_shape_and_usage(server: Running) -> None:
    answer = server.post(CHAT, BODY).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["seed"] == 7
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert set(answer["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}
    assert "metrics" not in answer


def test_a_seed_is_echoed_and_repeats_the_text(server: Running) -> None:
    body = {**BODY, "seed": None}
    first = server.post(CHAT, body).json()
    again = server.post(CHAT, {**body, "seed": first["seed"]}).json()
    other = server.post(CHAT, body).json()
    assert again["choices"] == first["choices"]
    assert other["seed"] != first["seed"]


def test_samples_differ_and_are_indexed(server: Running) -> None:
    answer = server.post(CHAT, {**BODY, "n": 4}).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert len({c["message"]["content"] for c in answer["choices"]}) > 1
    single = server.post(CHAT, BODY).json()
    assert answer["usage"]["prompt_tokens"] == single["usage"]["prompt_tokens"], "the prompt counts once"


def test_logprobs_are_those_of_the_raw_logits(server: Running, offline: LLM) -> None:
    answer = server.post(CHAT, {**BODY, "logprobs": True, "top_logprobs": 3}).json()["choices"][0]
    found = answer["logprobs"]["content"]
    (reference,) = offline.chat(MESSAGES, SamplingParams(max_tokens=24, temperature=0.8, seed=7, logprobs=3))
    assert reference.logprobs is not None
    assert len(found) == len(reference.logprobs)
    for item, known in zip(found, reference.logprobs, strict=True):
        assert item["logprob"] == pytest.approx(known.logprob, abs=1e-3)
        assert [t["logprob"] for t in item["top_logprobs"]] == pytest.approx([v for _, v in known.top], abs=1e-3)
    text = b"".join(bytes(item["bytes"] or []) for item in found).decode("utf-8", "replace")
    assert text.removesuffix("<|im_end|>") == answer["message"]["content"]
    assert (
        server.post(CHAT, {**BODY, "logprobs": True}).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        == []
    )


def test_speculation_statistics_on_request(server: Running) -> None:
    body = {**BODY, "temperature": 0, "max_completion_tokens": 100, "ignore_eos": True}
    answer = server.post(CHAT, {**body, "speculation": {"metrics": True}}).json()
    spec = answer["metrics"]["speculative_decoding"]
    accepted = sum(i * steps for i, steps in enumerate(spec["acceptance_histogram"]))
    assert spec["num_accepted_draft_tokens"] == accepted == sum(spec["accepted_by"].values()) > 0
    assert spec["num_spec_steps"] == sum(spec["acceptance_histogram"])
    assert spec["mean_acceptance_length"] == pytest.approx(1 + accepted / spec["num_spec_steps"])
    assert spec["draft_acceptance_rate"] == pytest.approx(accepted / spec["num_draft_tokens"])
    off = server.post(CHAT, {**body, "speculation": {"metrics": True, "off": True}}).json()
    assert off["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    capped = server.post(CHAT, {**body, "speculation": {"metrics": True, "cap": 1}}).json()
    assert capped["metrics"]["speculative_decoding"]["num_spec_tokens"] <= 1
    only = server.post(CHAT, {**body, "speculation": {"metrics": True, "drafters": ["suffix"]}}).json()
    assert set(only["metrics"]["speculative_decoding"]["accepted_by"]) <= {"suffix"}
    texts = {a["choices"][0]["message"]["content"] for a in (answer, off, capped, only)}
    assert len(texts) == 1, "the text does not depend on speculation"


def test_statistics_for_everyone() -> None:
    with serving(per_request_spec_decode_metrics="summary") as running:
        assert "speculative_decoding" in running.post(CHAT, BODY).json()["metrics"]
        last = events(running.post(CHAT, {**BODY, "stream": True}))[-1]
        assert last["choices"] == []
        assert "speculative_decoding" in last["metrics"]


def test_prediction_tokens_in_usage(server: Running) -> None:
    body = {**BODY, "temperature": 0, "max_completion_tokens": 40, "ignore_eos": True}
    known = server.post(CHAT, {**body, "speculation": "off"}).json()["choices"][0]["message"]["content"]
    drafters = {"speculation": {"drafters": ["prediction"]}}
    right = {**body, **drafters, "prediction": {"type": "content", "content": known}}
    details = server.post(CHAT, right).json()["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0
    wrong = {**body, **drafters, "prediction": {"type": "content", "content": "zzzzzzzzzzzzzzzzzzzz"}}
    details = server.post(CHAT, wrong).json()["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == 0
    assert details["rejected_prediction_tokens"] > 0


def test_token_ids_on_request(server: Running) -> None:
    answer = server.post(CHAT, {**BODY, "return_token_ids": True}).json()
    tokens = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert answer["prompt_token_ids"] == tokens
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


def test_messages_of_every_role_and_part(server: Running) -> None:
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]  # fmt: skip
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    prompt = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert "system\nbe short" in prompt
    assert "user\nab" in prompt
    assert '"name": "f"' in prompt
    assert "42" in prompt
    assert server.post(CHAT, {**BODY, "messages": messages}).status_code == 200


def test_continue_final_message(server: Running) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "the beginning"}]
    body = {**BODY, "messages": messages, "continue_final_message": True, "return_token_ids": True}
    ids = server.post(CHAT, body).json()["prompt_token_ids"]
    prompt = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert prompt.endswith("assistant\nthe beginning")


def test_usage_in_streams(server: Running) -> None:
    whole = server.post(CHAT, {**BODY, "n": 2}).json()
    plain = events(server.post(CHAT, {**BODY, "n": 2, "stream": True}))
    assert all("usage" not in chunk for chunk in plain)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(server.post(CHAT, {**BODY, "n": 2, **options}))
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][key] == whole["usage"][key]
    options["stream_options"]["continuous_usage_stats"] = True  # type: ignore[index]
    counts = [c["usage"]["completion_tokens"] for c in events(server.post(CHAT, {**BODY, **options}))]
    assert counts == sorted(counts)
    assert counts[0] > 0


def test_openapi_names_every_field(server: Running) -> None:
    document = server.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/v1/models/{model}",
        "/health", "/ready", "/metrics", "/version",
    }  # fmt: skip
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"speculation", "structured_outputs", "prediction", "tools", "top_k"} <= set(fields)
    assert "422" not in json.dumps(document["paths"])
