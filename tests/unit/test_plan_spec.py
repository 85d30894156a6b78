"""Reading speculation specs: the whole grammar, vLLM's JSON, and an error for whatever cannot be meant."""

from __future__ import annotations

import json

import pytest

from paceline.config import EngineConfig
from paceline.engine.builder import check_speculation
from paceline.errors import SpeculationSpecError
from paceline.plan.spec import AUTO_DRAFTERS, MAX_LENGTH, DrafterSpec, from_vllm_json, parse_speculation


def test_none_and_auto() -> None:
    assert parse_speculation(" none ").drafters == ()
    auto = parse_speculation("auto")
    assert tuple(d.name for d in auto.drafters) == AUTO_DRAFTERS
    assert auto.policy == "auto"
    assert all(d.k is None and d.maximum is None for d in auto.drafters)


@pytest.mark.parametrize(
    ("text", "drafters", "policy", "options"),
    [
        ("ngram", [DrafterSpec("ngram")], "auto", {}),
        ("ngram:k=4", [DrafterSpec("ngram", 4)], "fixed", {}),
        ("ngram:max=4", [DrafterSpec("ngram", None, 4)], "auto", {}),
        (f"ngram:k={MAX_LENGTH}", [DrafterSpec("ngram", MAX_LENGTH)], "fixed", {}),
        (" ngram:k = 4 , lookup_max = 3 ", [DrafterSpec("ngram", 4, None, {"lookup_max": "3"})], "fixed", {}),
        ("ngram + recycling @ auto", [DrafterSpec("ngram"), DrafterSpec("recycling")], "auto", {}),
        ("ngram:k=4+recycling:k=16", [DrafterSpec("ngram", 4), DrafterSpec("recycling", 16)], "fixed", {}),
        ("ngram+recycling:max=9", [DrafterSpec("ngram"), DrafterSpec("recycling", None, 9)], "auto", {}),
        ("ngram+recycling@auto", [DrafterSpec("ngram"), DrafterSpec("recycling")], "auto", {}),
        ("ngram@fixed:k=3", [DrafterSpec("ngram", 3)], "fixed", {"k": "3"}),
        ("ngram:k=5+recycling@fixed:k=3", [DrafterSpec("ngram", 5), DrafterSpec("recycling", 3)], "fixed", {"k": "3"}),
        ("ngram@other:a=1,b='x,y@z'", [DrafterSpec("ngram")], "other", {"a": "1", "b": "x,y@z"}),
        ('draft:model="a+b,c@d",k=2', [DrafterSpec("draft", 2, None, {"model": "a+b,c@d"})], "fixed", {}),
        ("draft:model='say \"x\"'", [DrafterSpec("draft", None, None, {"model": 'say "x"'})], "auto", {}),
        ("draft:model=/a/b=c:d", [DrafterSpec("draft", None, None, {"model": "/a/b=c:d"})], "auto", {}),
    ],
)
def test_grammar(text: str, drafters: list[DrafterSpec], policy: str, options: dict[str, str]) -> None:
    spec = parse_speculation(text)
    assert [DrafterSpec(d.name, d.k, d.maximum, dict(d.options)) for d in spec.drafters] == drafters
    assert (spec.policy, dict(spec.policy_options)) == (policy, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a name"),
        ("+ngram", "not a name"),
        ("ngram+", "not a name"),
        ("ngram@", "not a name"),
        ("n gram", "not a name"),
        ("ngram:", "key=value"),
        ("ngram:k", "key=value"),
        ("ngram:k=", "key=value"),
        ("ngram:=4", "key=value"),
        ("ngram:k=4,", "key=value"),
        ("ngram:k=4,k=5", "twice"),
        ("ngram:k=0", "whole number"),
        ("ngram:k=-1", "whole number"),
        (f"ngram:k={MAX_LENGTH + 1}", "whole number"),
        ("ngram:k=4.5", "whole number"),
        ("ngram:max=many", "whole number"),
        ("ngram:k=4,max=5", "exclude"),
        ("ngram+ngram", "twice"),
        ("none+ngram", "alone"),
        ("ngram+auto", "alone"),
        ("ngram@auto@fixed", "more than one"),
        ("ngram@fixed", "needs k="),
        ("ngram@fixed:k=x", "whole number"),
        ("ngram:k=4+recycling", "every drafter"),
        ("ngram:k=4@auto", "every drafter"),
        ("draft:model='abc", "not closed"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(SpeculationSpecError, match=message) as caught:
        parse_speculation(text)
    assert caught.value.field == "speculation"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        ({"method": "ngram", "num_speculative_tokens": 4}, "ngram:k=4,lookup_max=5,lookup_min=5"),
        (
            {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
            "ngram:k=4,lookup_max=4,lookup_min=2",
        ),
        ({"method": "[ngram]", "prompt_lookup_max": 3}, "ngram:lookup_max=3,lookup_min=3"),
        ({"method": "draft_model", "model": "a/b", "num_speculative_tokens": 3}, 'draft:model="a/b",k=3'),
        ({"model": "a+b,c"}, 'draft:model="a+b,c"'),
    ],
)
def test_vllm_json(config: dict[str, object], spec: str) -> None:
    assert from_vllm_json(json.dumps(config)) == spec
    parsed = parse_speculation(spec)
    assert parsed.drafters[0].k == config.get("num_speculative_tokens")
    if "model" in config:
        assert parsed.drafters[0].options["model"] == config["model"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '"ngram"',
        "{}",
        '{"method": "eagle", "model": "x"}',
        '{"method": "ngram", "beam": 3}',
        '{"method": "ngram", "num_speculative_tokens": 0}',
        '{"method": "ngram", "num_speculative_tokens": true}',
        '{"method": "ngram", "num_speculative_tokens": 2.5}',
        '{"method": "draft_model"}',
        '{"model": 3}',
    ],
)
def test_vllm_json_that_is_refused(text: str) -> None:
    with pytest.raises(SpeculationSpecError):
        from_vllm_json(text)


@pytest.mark.parametrize("spec", ["ngram@auto:alpha=3", "ngram@fixed:k=4,bogus=1", "ngram:max=9@fixed:k=4", "ngram@x"])
def test_policy_options_are_not_dropped_silently(spec: str) -> None:
    with pytest.raises(SpeculationSpecError):
        check_speculation(EngineConfig(speculation=spec))
