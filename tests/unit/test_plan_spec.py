"""Reading speculation specs: the whole grammar, vLLM's JSON, and an error for whatever cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_tools import greedy, llm, prompt_of, reference
from fakes import save_heads, with_head

from paceline.config import EngineConfig
from paceline.engine.speculation import check_speculation
from paceline.errors import ConfigError, SpeculationSpecError
from paceline.plan.registry import POLICIES
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
        ("ngram:k=0", [DrafterSpec("ngram", 0)], "fixed", {}),
        ("ngram:max=0", [DrafterSpec("ngram", None, 0)], "auto", {}),
        ("ngram:k=4@auto", [DrafterSpec("ngram", 4)], "auto", {}),
        ("ngram:k=4+recycling", [DrafterSpec("ngram", 4), DrafterSpec("recycling")], "auto", {}),
        ("ngram:k=4+recycling@bass", [DrafterSpec("ngram", 4), DrafterSpec("recycling")], "bass", {}),
        ("ngram@smartspec-request", [DrafterSpec("ngram")], "smartspec-request", {}),
        ("ngram@threshold:p=0.2", [DrafterSpec("ngram")], "threshold", {"p": "0.2"}),
        ("ngram@fixed:k=3", [DrafterSpec("ngram", 3)], "fixed", {}),
        ("ngram:k=5+recycling@fixed:k=3", [DrafterSpec("ngram", 5), DrafterSpec("recycling", 3)], "fixed", {}),
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
        ("ngram:max=4+recycling@fixed:k=2", "no max="),
        ("ngram:k=4+recycling@fixed", "needs k="),
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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ngram@auto:alpha=3", "no option 'alpha'.*It takes: share"),
        ("ngram@fixed:k=4,bogus=1", "no option 'bogus'.*It takes none"),
        ("ngram:max=9@fixed:k=4", "no max="),
        ("ngram@x", "unknown policy 'x'.*Known policies: auto, bass"),
        ("ngram@auto:share=much", "share=much is impossible"),
        ("ngram@auto:share=-0.1", "between 0 and 10"),
        ("ngram@auto:share=nan", "between 0 and 10"),
        ("ngram@threshold:p=1.5", "between 0 and 1"),
    ],
)
def test_policy_options_are_not_dropped_silently(spec: str, message: str) -> None:
    with pytest.raises(SpeculationSpecError, match=message):
        check_speculation(EngineConfig(speculation=spec))


def test_policy_options_arrive_typed() -> None:
    assert check_speculation(EngineConfig(speculation="ngram@auto:share=0.25")).policy_options == {"share": 0.25}
    assert check_speculation(EngineConfig(speculation="ngram@threshold:p=0.2")).policy_options == {"p": 0.2}
    assert check_speculation(EngineConfig(speculation="ngram:k=3@bass")).policy_options == {}


def test_a_fixed_length_among_planned_ones_reaches_the_policy() -> None:
    """`k=` is a promise whatever the policy; `@fixed` needs no such distinction."""
    engine = llm("ngram:k=3+recycling:max=9@heuristic").engine
    by_name = {d.name: d for d in engine.stages.policy._drafters}
    assert (by_name["ngram"].most, by_name["ngram"].fixed) == (3, True)
    assert (by_name["recycling"].most, by_name["recycling"].fixed) == (9, False)
    assert not any(d.fixed for d in llm("ngram:k=3").engine.stages.policy._drafters)


@pytest.mark.parametrize("spec", ["ngram:k=0", "ngram:max=0", "ngram:k=0+recycling:k=0", "ngram:max=0@bass"])
def test_a_length_of_zero_never_drafts(spec: str) -> None:
    engine = llm(spec)
    (found,) = engine.generate(prompt_of(20), greedy(12))
    assert found.token_ids == reference(prompt_of(20), 12)
    assert found.outputs[0].stats.draft_tokens == 0


@pytest.mark.parametrize(
    ("tree", "rules"),
    [
        ("rsd-s", "coupled, recursive"),
        ("rsd-c:widths=2/2", "coupled, recursive"),
        ("branching", "coupled, recursive, multi"),
        ("cape", "coupled, recursive, multi"),
    ],
)
def test_a_rule_for_chains_names_the_rules_that_take_the_tree(tree: str, rules: str) -> None:
    """And each of these does take it."""
    with pytest.raises(ConfigError, match=rf"one of the rules {rules} with the tree\.$"):
        check_speculation(EngineConfig(speculation="draft:model=x", rule="rejection", tree=tree))
    for rule in rules.split(", "):
        check_speculation(EngineConfig(speculation="draft:model=x", rule=rule, tree=tree))


def test_a_tree_that_nobody_would_grow_is_refused() -> None:
    for speculation, way_out in (
        ("none", r"write draft:model"),
        ("auto", r"write draft:model"),
        ("ngram", r"add \+draft"),
    ):
        with pytest.raises(ConfigError, match=way_out):
            check_speculation(EngineConfig(speculation=speculation, tree="cape"))
        for tree in ("auto", "chain"):
            check_speculation(EngineConfig(speculation=speculation, tree=tree))


@pytest.mark.parametrize("policy", [name for name, entry in POLICIES.items() if entry.stops_drafts])
def test_a_policy_that_could_do_nothing_is_refused(policy: str, tmp_path: Path) -> None:
    """These policies are only asked during the drafts of a draft model whose length is not fixed."""
    named = with_head(policy, save_heads(tmp_path, 8))
    for spec in (f"ngram@{named}", f"ngram:k=3+recycling@{named}"):
        with pytest.raises(SpeculationSpecError, match=r"has none.*draft:model=NAME@") as caught:
            check_speculation(EngineConfig(speculation=spec))
        assert caught.value.field == "speculation"
    with pytest.raises(SpeculationSpecError, match="Write max=4 instead of k=4"):
        check_speculation(EngineConfig(speculation=f"ngram+draft:model=x,k=4@{named}"))
    for spec in (f"draft:model=x@{named}", f"ngram+draft:model=x,max=4@{named}", f"ouroboros:model=x@{named}"):
        check_speculation(EngineConfig(speculation=spec))
