"""The requests of clients too heavy for CI, as they send them, and their reading of the answers, as they do it:
lm-eval 0.4.13, vLLM 0.32's `bench serve`, guidellm 0.8.1, AIPerf 0.13.0. docs/clients.md says how to run them.
"""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any

import pytest
import torch
import transformers
from server_tools import END, Running, events, make_byte_loaded

from paceline.engine.types import TokenLogprobs

SENTENCES = [("the thing", " and the inner"), ("an €", " in 10 € nur"), ("😀", "\n\ther")]


def lm_eval_loglikelihoods(server: Running, prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    """`LocalCompletionsAPI._create_payload` for log-likelihoods."""
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    response = server.post("/v1/completions", {**body, "echo": True, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def lm_eval_parse(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """`LocalCompletionsAPI.parse_logprobs`."""
    found = []
    choices = sorted(answer["choices"], key=itemgetter("index"))
    for choice, length in zip(choices, context_lengths, strict=True):
        values = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        found.append((sum(values), all(v == max(top.values()) for v, top in zip(values, tops, strict=True))))
    return found


def reference(ids: list[int], start: int) -> tuple[float, bool]:
    """The same from one forward of `transformers`' own attention."""
    loaded = make_byte_loaded()
    model = transformers.AutoModelForCausalLM.from_config(loaded.config, attn_implementation="eager").eval()
    model.load_state_dict(loaded.model.state_dict())
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows = range(start - 1, len(ids) - 1)
    greedy = all(int(logprobs[row].argmax()) == ids[row + 1] for row in rows)
    return sum(float(logprobs[row, ids[row + 1]]) for row in rows), greedy


def test_lm_eval_loglikelihoods(server: Running) -> None:
    tokenizer = server.service.loaded.tokenizer
    contexts = [tokenizer.encode(context) for context, _ in SENTENCES]
    whole = [
        context + tokenizer.encode(continuation) for context, (_, continuation) in zip(contexts, SENTENCES, strict=True)
    ]
    # One continuation that is the model's own first choice (it also knows tokens that its tokenizer does not).
    starts = [[i] for i in range(40, 90)]
    body = {"prompt": starts, "temperature": 0, "max_tokens": 1, "return_token_ids": True}
    firsts = [choice["token_ids"] for choice in server.post("/v1/completions", body).json()["choices"]]
    start, first = next(pair for pair in zip(starts, firsts, strict=True) if pair[1][0] < len(tokenizer))
    contexts.append(start)
    whole.append(start + first)
    lengths = [len(context) for context in contexts]
    expected = [reference(ids, length) for ids, length in zip(whole, lengths, strict=True)]
    assert [greedy for _, greedy in expected] == [False, False, False, True]
    together = lm_eval_parse(lm_eval_loglikelihoods(server, whole), lengths)
    apart = [
        lm_eval_parse(lm_eval_loglikelihoods(server, [ids]), [length])[0]
        for ids, length in zip(whole, lengths, strict=True)
    ]
    for found in (together, apart):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_lm_eval_counts_on_one_entry_for_the_new_token(server: Running) -> None:
    end = server.service.loaded.tokenizer.convert_tokens_to_ids(END)
    [choice] = lm_eval_loglikelihoods(server, [[70, 71, 72]], logit_bias={str(end): 100})["choices"]
    assert choice["finish_reason"] == "stop"
    assert {len(values) for values in choice["logprobs"].values()} == {4}


def test_lm_eval_takes_the_likeliest_of_equal_texts(server: Running) -> None:
    unknown = server.service.loaded.config.vocab_size - 1  # the tokenizer has no text for it, nor for others
    top = TokenLogprobs(unknown, -3.0, ((unknown - 1, -0.5), (70, -1.0), (unknown - 2, -2.0)))
    assert server.service.tokens.top(top) == {"": -0.5, "g": -1.0}


def test_lm_eval_generation(server: Running) -> None:
    prompt = server.service.loaded.tokenizer.encode("the thing")
    body = {"model": "tiny", "max_tokens": 20, "temperature": 0.0, "seed": 1234}
    whole = server.post("/v1/completions", {**body, "prompt": [prompt], "stop": [END]}).json()["choices"][0]["text"]
    until = [whole[4:6], "\n\n", END]
    answer = server.post("/v1/completions", {**body, "prompt": [prompt, prompt], "stop": until}).json()
    assert [choice["text"] for choice in answer["choices"]] == [whole[: whole.index(until[0])]] * 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_vllm_bench(server: Running, path: str) -> None:
    before = vllm_bench_counters(server)
    body: dict[str, Any] = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    body |= {"temperature": 0, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
    if path == "/v1/completions":
        body |= {"prompt": "the the the the the", "max_tokens": 24, "logprobs": None}
    else:
        content = [{"type": "text", "text": "the the the the the"}]
        body |= {"messages": [{"role": "user", "content": content}], "max_completion_tokens": 24}
    response = server.post(path, body, headers={"x-request-id": "bench-0"})
    assert response.headers["x-request-id"] == "bench-0"
    chunks = events(response)
    assert all(chunk["choices"] or chunk["usage"]["completion_tokens"] == 24 for chunk in chunks)
    assert not chunks[-1]["choices"]
    after = vllm_bench_counters(server)
    assert before.keys() <= after.keys()
    assert after["vllm:spec_decode_num_draft_tokens_total"] >= after["vllm:spec_decode_num_accepted_tokens_total"]


def vllm_bench_counters(server: Running) -> dict[str, float]:
    """`fetch_spec_decode_metrics`: read without a key, by name."""
    lines = server.get("/metrics").text.split("\n")
    named = [line.split(None, 1) for line in lines if line.startswith("vllm:spec_decode")]
    return {name.split("{")[0]: float(value) for name, value in named if name.split("{")[0].endswith("_total")}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(server: Running, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body: dict[str, Any] = {"model": "tiny", "stream": True, "stream_options": options, "stop": None}
    if path == "/v1/completions":
        body |= {"prompt": "the thing", "max_tokens": 9, "ignore_eos": True}
    else:
        content = [{"type": "text", "text": "the thing"}]
        body |= {"messages": [{"role": "user", "content": content}], "max_completion_tokens": 9, "ignore_eos": True}
    chunks = events(server.post(path, body))
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wish", [{"metrics": True}, {"metrics": True, "off": True}], ids=["on", "off"])
def test_aiperf(server: Running, stream: bool, wish: dict[str, bool]) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "the the the the"}], "max_completion_tokens": 30}
    body |= {"stream": stream, "temperature": 0, "speculation": wish}
    if stream:
        chunks = events(server.post("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}))
        assert [chunk for chunk in chunks if "metrics" in chunk] == chunks[-1:]
        aiperf_check(chunks[-1])
    else:
        aiperf_check(server.post("/v1/chat/completions", body).json())


def aiperf_check(answer: dict[str, Any]) -> None:
    """`VLLMSpecDecodeAdapter.adapt` and the invariants of its record."""
    numbers = json.loads(json.dumps(answer["metrics"]["speculative_decoding"]))
    histogram = numbers["acceptance_histogram"]
    assert len(histogram) == numbers["num_spec_tokens"] + 1
    assert sum(histogram) == numbers["num_spec_steps"]
    assert sum(j * steps for j, steps in enumerate(histogram)) == numbers["num_accepted_draft_tokens"]
    assert numbers["num_accepted_draft_tokens"] <= numbers["num_draft_tokens"]
    assert numbers["mean_acceptance_length"] >= 1.0
    assert 0.0 <= numbers["draft_acceptance_rate"] <= 1.0
