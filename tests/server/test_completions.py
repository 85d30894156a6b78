"""Text completions: lists of prompts, token ids, echo with log-probabilities as lm-eval reads them."""

from __future__ import annotations

from typing import Any

import pytest
from server_tools import Running, events, make_byte_loaded

from paceline import LLM, SamplingParams

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def offline() -> LLM:
    return LLM(make_byte_loaded(), speculation="none", kv_cache_memory=8 << 20)


def test_every_form_of_prompt(server: Running) -> None:
    body: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    ids = server.post("/tokenize", {"prompt": "the and"}).json()["tokens"]
    texts = []
    for prompt in ("the and", ids, ["the and"], [ids], ["the and", "in the"], [ids, ids]):
        answer = server.post(PATH, {**body, "prompt": prompt})
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        assert [c["index"] for c in choices] == list(range(len(choices)))
        texts.append(choices[0]["text"])
    assert len(set(texts)) == 1


def test_default_length_is_16(server: Running) -> None:
    answer = server.post(PATH, {"prompt": "the", "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_equal_prompts_are_independent_samples(server: Running) -> None:
    answer = server.post(PATH, {"prompt": ["the", "the", "the"], "seed": 1, "max_tokens": 12, "n": 2}).json()
    texts = [c["text"] for c in answer["choices"]]
    assert len(texts) == 6
    assert len(set(texts)) > 3
    second = server.post(PATH, {"prompt": "the", "seed": 2, "max_tokens": 12, "n": 2}).json()
    assert [c["text"] for c in second["choices"]] == texts[2:4], "prompt number i has seed + i"


def test_echo_with_logprobs(server: Running, offline: LLM) -> None:
    prompt = "the and in"
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2}
    choice = server.post(PATH, body).json()["choices"][0]
    (known,) = offline.generate(prompt, SamplingParams(max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=2))
    assert known.prompt_logprobs is not None
    assert known.logprobs is not None
    assert choice["text"] == prompt + known.text
    found = choice["logprobs"]
    values = [None if item is None else item.logprob for item in (*known.prompt_logprobs, *known.logprobs)]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(values[1:], abs=1e-3)
    assert len(found["tokens"]) == len(found["text_offset"]) == len(values)
    assert "".join(found["tokens"][: len(known.prompt_logprobs)]) == prompt
    assert [prompt[at] for at in found["text_offset"][:4]] == [token[0] for token in found["tokens"][:4]]


def test_scoring_without_generating(server: Running) -> None:
    body = {"prompt": "the and in", "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    answer = server.post(PATH, body).json()
    choice = answer["choices"][0]
    assert choice["text"] == "the and in"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    streamed = events(server.post(PATH, {**body, "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in streamed) == "the and in"


def test_the_likeliest_token_is_told_apart(server: Running) -> None:
    """lm-eval calls an answer greedy if each token is the likeliest by text: no two tokens may share theirs."""
    body = {"prompt": "\u20ac\u20ac", "max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    found = server.post(PATH, body).json()["choices"][0]["logprobs"]
    for token, top in zip(found["tokens"], found["top_logprobs"], strict=True):
        assert token == max(top, key=top.get)


def test_streamed_pieces_are_the_whole(server: Running) -> None:
    body = {"prompt": ["the", "and"], "max_tokens": 20, "seed": 5, "logprobs": 1, "echo": True, "n": 2}
    whole = server.post(PATH, body).json()["choices"]
    chunks = events(server.post(PATH, {**body, "stream": True}))
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        for key in ("tokens", "text_offset"):
            assert [x for c in mine for x in c["logprobs"][key]] == choice["logprobs"][key]
        values = [x for c in mine for x in c["logprobs"]["token_logprobs"]]
        assert values[1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-4), "batches may differ"
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
