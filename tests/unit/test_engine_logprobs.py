"""Reported log-probabilities are log_softmax of a plain `transformers` forward, with and without speculation."""

from __future__ import annotations

import pytest
import torch
from engine_tools import TOKEN_BYTES, greedy, llm, make_request, prompt_of, reference, reference_logits, run

from paceline import LLM, SamplingParams
from paceline.engine.types import TokenLogprobs

PROMPT = prompt_of(27)
TOP = 4
SPECULATION = ["none", "ngram:k=4", "recycling:k=24", "prediction:k=6+recycling:k=24"]


def check(found: tuple[TokenLogprobs, ...], tokens: list[int], first: int, top: int = TOP) -> None:
    """`found` are the entries of `tokens[first:]`."""
    expected = torch.log_softmax(reference_logits(tokens).double(), dim=-1)
    assert len(found) == len(tokens) - first
    for i, entry in enumerate(found):
        row = expected[first + i - 1]
        assert entry.token_id == tokens[first + i]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        best = row.topk(top) if top else None
        assert [t for t, _ in entry.top] == (best.indices.tolist() if best else [])
        assert [v for _, v in entry.top] == pytest.approx(best.values.tolist() if best else [], abs=1e-4)


def complete(engine: LLM, **options: object) -> tuple[list[int], tuple[TokenLogprobs, ...]]:
    prediction = " ".join(f"w{t}" for t in reference(PROMPT, 20)[:15])
    fields = {"max_tokens": 20, "ignore_eos": True, "prediction": prediction, "logprobs": TOP, "seed": 5, **options}
    (found,) = engine.generate([PROMPT], SamplingParams(**fields))
    assert found.logprobs is not None
    return [*PROMPT, *found.token_ids], found.logprobs


@pytest.mark.parametrize("speculation", SPECULATION)
def test_logprobs_equal_transformers(speculation: str) -> None:
    engine = llm(speculation)
    for _ in range(2):
        tokens, logprobs = complete(engine, temperature=0.0)
        assert tuple(tokens[len(PROMPT) :]) == reference(PROMPT, 20)
        check(logprobs, tokens, len(PROMPT))


@pytest.mark.parametrize("speculation", SPECULATION)
def test_they_are_raw_whatever_the_sampling_options(speculation: str) -> None:
    """Penalties, bias, temperature and truncation change what is drawn, not what is reported."""
    plain, _ = complete(llm("none"), temperature=0.8, top_k=20, frequency_penalty=1.0, logit_bias={9: 3.0})
    tokens, logprobs = complete(llm(speculation), temperature=0.8, top_k=20, frequency_penalty=1.0, logit_bias={9: 3.0})
    assert tokens == plain
    assert tuple(tokens[len(PROMPT) :]) != reference(PROMPT, 20)
    check(logprobs, tokens, len(PROMPT))


@pytest.mark.parametrize("top", [0, 1])
def test_fewer_alternatives(top: int) -> None:
    tokens, logprobs = complete(llm("recycling:k=24"), temperature=0.0, logprobs=top)
    check(logprobs, tokens, len(PROMPT), top)


def test_none_are_reported_unless_asked_for() -> None:
    (found,) = llm("none").generate([PROMPT], greedy(3))
    assert found.logprobs is None
    assert found.prompt_logprobs is None


@pytest.mark.parametrize("speculation", SPECULATION)
@pytest.mark.parametrize("chunk", [512, 10])
def test_prompt_logprobs(speculation: str, chunk: int) -> None:
    """They cover the whole prompt also when it comes in chunks, and bypass a prefix hit."""
    engine = llm(speculation, max_num_batched_tokens=chunk, block_size=8)
    engine.generate([PROMPT], greedy(2))
    (warm,) = engine.generate([PROMPT], greedy(20))
    assert warm.stats.cached_tokens == 24
    (found,) = engine.generate([PROMPT], greedy(20, prompt_logprobs=TOP, logprobs=TOP))
    assert found.stats.cached_tokens == 0
    assert found.token_ids == reference(PROMPT, 20)
    assert found.prompt_logprobs is not None
    assert found.logprobs is not None
    assert found.prompt_logprobs[0] is None
    check(found.prompt_logprobs[1:], list(PROMPT), 1)
    check(found.logprobs, [*PROMPT, *found.token_ids], len(PROMPT))


def test_prompt_logprobs_of_one_token() -> None:
    (found,) = llm("none").generate([[7]], greedy(2, prompt_logprobs=2))
    assert found.prompt_logprobs == (None,)


def test_they_survive_a_preemption() -> None:
    """Preempted while its prompt is computed in chunks: no entry is missing or doubled."""
    engine = llm(
        "none", kv_cache_memory=10 * 8 * TOKEN_BYTES, block_size=8, max_model_len=80, max_num_batched_tokens=12
    ).engine
    old = make_request(prompt_of(30), greedy(24))
    young = make_request(prompt_of(27, seed=3), greedy(12, prompt_logprobs=TOP, logprobs=TOP))
    third = make_request(prompt_of(25, seed=4), greedy(12, prompt_logprobs=TOP, logprobs=TOP))
    news = run(engine, [old, young, third])
    assert young.stats.preemptions + third.stats.preemptions > 0
    for request in (young, third):
        prompt = request.token_ids[: request.prompt_len]
        reported = [item.prompt_logprobs for item in news[request.id] if item.prompt_logprobs]
        assert len(reported) == 1
        check(reported[0][1:], prompt, 1)
        check(tuple(lp for item in news[request.id] for lp in item.logprobs), request.token_ids, request.prompt_len)


def test_each_of_n_samples_has_its_own() -> None:
    (found,) = llm("recycling:k=24").generate(
        [PROMPT], SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP)
    )
    assert len({o.token_ids for o in found.outputs}) == 3
    for output in found.outputs:
        assert output.logprobs is not None
        check(output.logprobs, [*PROMPT, *output.token_ids], len(PROMPT))
    assert found.prompt_logprobs is not None
    check(found.prompt_logprobs[1:], list(PROMPT), 1)
