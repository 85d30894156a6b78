"""What the engine refuses, with a typed error that names the field, and that nothing of it is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_tools import TOKEN_BYTES, greedy, llm, loaded, make_request, prompt_of, reference, run
from fakes import make_llm

from paceline import SamplingParams, errors
from paceline.config import EngineConfig

PROMPT = prompt_of(5)


@pytest.mark.parametrize(
    ("prompt", "kind", "field"),
    [
        ([], errors.RequestError, "prompt"),
        ([3] * 512, errors.PromptTooLongError, "prompt"),
        ([3, 96], errors.RequestError, "prompt"),
        ([-1], errors.RequestError, "prompt"),
        (["w3"], errors.RequestError, "prompt"),
        ([True], errors.RequestError, "prompt"),
    ],
)
def test_prompts_that_are_refused(prompt: Any, kind: type[errors.RequestError], field: str) -> None:
    engine = llm()
    with pytest.raises(kind) as caught:
        engine.generate([PROMPT, prompt], greedy(2))
    assert caught.value.field == field
    assert not engine.engine.has_work, "nothing of the call is left behind"
    assert engine.generate([PROMPT], greedy(2))[0].token_ids == reference(PROMPT, 2)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"params": greedy(2, logit_bias={96: 1.0})}, "logit_bias"),
        ({"params": greedy(2, stop_token_ids=(96,))}, "stop_token_ids"),
        ({"params": greedy(2, stop_token_ids=(-1,))}, "stop_token_ids"),
        ({"prediction_ids": (5, 96)}, "prediction"),
        ({"id": "twice"}, "request_id"),
    ],
)
def test_requests_that_are_refused(fields: dict[str, Any], field: str) -> None:
    engine = llm("prediction:k=4").engine
    engine.add(make_request(PROMPT, greedy(2), id="twice"))
    with pytest.raises(errors.RequestError) as caught:
        engine.add(make_request(PROMPT, **fields))
    assert caught.value.field == field
    assert len(run(engine, [])) == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kv_cache_memory": 4 * 16 * TOKEN_BYTES, "max_model_len": 100}, "kv_cache_memory"),
        ({"kv_cache_memory": 1}, "kv_cache_memory"),
        ({"max_model_length": 3}, "max_model_length"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"block_size": 0}, "block_size"),
        ({"rule": "nope"}, "rule"),
        ({"tree": "nope"}, "tree"),
        ({"rule": "rejection", "tree": "rsd-s:width=3"}, "tree"),
        ({"speculation": "nope:k=3"}, "speculation"),
        ({"speculation": "ngram:k=3,depth=2"}, "speculation"),
        ({"speculation": "ngram:k=3,lookup_max=x"}, "speculation"),
        ({"speculation": "ngram:k=3,lookup_max=1"}, "speculation"),
        ({"speculation": "ngram@nope"}, "speculation"),
        ({"speculation": "draft:k=3"}, "speculation"),
        ({"speculation": "ngram:k=48", "max_model_len": 48}, "speculation"),
        ({"speculation": "ngram:max=64", "max_model_len": 48}, "speculation"),
        ({"speculation": "ngram:k=4", "tree": "k-ary:k=2"}, "tree"),
        ({"speculation": "ngram:k=4", "tree": "k-ary:depth=2"}, "tree"),
        ({"rule": "multi", "tree": "rsd-s:width=3"}, "tree"),
        ({"rule": "multi", "tree": "rsd-c:widths=2/2"}, "tree"),
        ({"speculation": "none", "tree": "cape"}, "tree"),
        ({"speculation": "auto", "tree": "cape"}, "tree"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        make_llm(loaded(), **options)
    assert caught.value.field == field


def test_a_cache_smaller_than_the_model_shortens_the_context() -> None:
    engine = llm(kv_cache_memory=4 * 16 * TOKEN_BYTES)
    assert engine.engine.max_model_len == 64
    with pytest.raises(errors.PromptTooLongError, match="64"):
        engine.generate([[3] * 64])


def test_params_for_another_number_of_prompts() -> None:
    with pytest.raises(errors.RequestError):
        llm().generate([PROMPT], [greedy(), greedy()])


@pytest.mark.parametrize("salt", [5, "\ud800"])
def test_salts_that_are_refused(salt: Any) -> None:
    with pytest.raises(errors.RequestError, match="cache_salt"):
        llm().generate([PROMPT], cache_salt=salt)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"prediction": 3}, "prediction"), ({"ignore_eos": "no"}, "ignore_eos"), ({"temperature": "hot"}, "temperature")],
)
def test_sampling_options_of_the_wrong_type(options: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.SamplingParamsError, match=field):
        SamplingParams(**options)
    assert SamplingParams(logit_bias=None).logit_bias == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"max_num_seqs": "4"}, {"max_model_len": 1.5}, {"speculation": None}])
def test_engine_options_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        EngineConfig(**options)


def test_arrays_are_prompts_too() -> None:
    engine = llm()
    assert engine.generate(np.array(PROMPT))[0].prompt_token_ids == tuple(PROMPT)
    assert engine.generate([np.array(PROMPT)])[0].prompt_token_ids == tuple(PROMPT)
    with pytest.raises(errors.RequestError, match="params"):
        engine.generate([PROMPT], {"max_tokens": 3})  # type: ignore[arg-type]
