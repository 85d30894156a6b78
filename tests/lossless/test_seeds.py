"""Same seed, same text: with and without speculation, in any batch, resubmitted half way, under every sampling option.

This is what rule `coupled` promises in exact arithmetic; in fp32 rounding could flip a draw only where two perturbed
logits agree to about 1e-5, and the fixed seeds here have no such place. Tiny models try all options, the real one some.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lossless.loop import Tiny, make_tiny
from lossless.real import chat_prompts, real_llm
from lossless.reference import OPTION_MIXES

from paceline import LLM, RequestSpeculation, SamplingParams
from paceline.model.loader import LoadedModel
from paceline.outputs import Generation
from paceline.plan.registry import POLICIES
from paceline.verify import coupled

VOCAB = 48
SPECS = (
    "ngram:k=4",
    "recycling:k=12",
    "suffix:k=12",
    "draft:k=3,model=DRAFT",
    "draft:k=3,guess=ngram,model=DRAFT",
    "ouroboros:k=8,model=DRAFT",
    "easyspec:k=3,group=2,model=DRAFT",
    "layerskip:k=3,skip=1",
    "magicdec:k=3,budget=32",
    "s3d:k=3,ends=1",
    "rapid:k=3,start=1,chunk=1,budget=2,question=1,model=DRAFT",
    "ngram:k=3+recycling:k=8+draft:k=2,model=DRAFT",
    "recycling+suffix+draft:model=DRAFT@auto",
)
MIXES: dict[str, dict[str, Any]] = {
    **OPTION_MIXES,
    "stop_strings": {"stop": ("w7w", "w11", "w20w3")},
    "stop_token_ids": {"stop_token_ids": (5, 9), "min_tokens": 6},
    "end_token": {"ignore_eos": False, "logit_bias": {2: 2.0}},
    "logprobs": {"logprobs": 3},
    "prediction": {"prediction": "w3 w4 w5 w6 w7 w8 w3 w4"},
}
PROMPTS = ([3, 4, 5, 3, 4], [7, 8, 9, 7, 8, 9, 7], [11] * 20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("draft"), vocab_size=VOCAB, num_hidden_layers=2)


def params(seed: int | None, **options: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_tokens": 20, "ignore_eos": True, **options})


def texts(generations: Sequence[Generation]) -> list[Any]:
    """Everything that must be equal."""
    outputs = [o for g in generations for o in g.outputs]
    assert all(o.error is None for o in outputs)
    return [
        (o.token_ids, o.text, o.finish_reason, o.seed, o.logprobs and [p.token_id for p in o.logprobs]) for o in outputs
    ]


def sample(llm: LLM, mix: str = "plain", prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Any]:
    """Three prompts with four samples each, in one batch."""
    many = [params(100 + i, n=4, **MIXES[mix]) for i in range(len(prompts))]
    return texts(llm.generate([list(p) for p in prompts], many))


@pytest.mark.parametrize("mix", MIXES)
def test_every_option_mix_gives_one_text(tiny: Tiny, mix: str) -> None:
    expected = sample(tiny.llm("none"), mix)
    few = ("prediction:k=4" if mix == "prediction" else "ngram:k=4", *SPECS[3:])
    for speculation in SPECS if mix == "plain" else few:
        assert sample(tiny.llm(speculation), mix) == expected, speculation


def test_the_mixes_do_what_they_say(tiny: Tiny) -> None:
    """Otherwise equality of texts would say nothing about the options."""
    llm = tiny.llm("none")
    by_mix = {mix: sample(llm, mix) for mix in MIXES}
    plain = [text[:2] for text in by_mix["plain"]]
    for mix, found in by_mix.items():
        if mix not in ("plain", "logprobs", "prediction", "min_tokens"):
            assert [text[:2] for text in found] != plain, mix
    assert "stop" in {text[2] for text in by_mix["stop_strings"]}
    assert {text[2] for text in by_mix["end_token"]} == {"stop", "length"}
    assert all(len(text[0]) >= 6 for text in by_mix["stop_token_ids"])


def test_speculation_is_at_work(tiny: Tiny) -> None:
    for speculation in SPECS[:-1]:
        generations = tiny.llm(speculation).generate([list(p) for p in PROMPTS], [params(i, n=4) for i in range(3)])
        assert sum(o.stats.accepted_tokens for g in generations for o in g.outputs) > 0, speculation


@pytest.mark.parametrize("speculation", ["none", *SPECS])
def test_alone_and_in_a_batch_of_eight(tiny: Tiny, speculation: str) -> None:
    prompts = [[3 + i % 5, 4, 5, 3 + i % 5, 4][: 3 + i % 3] for i in range(8)]
    llm = tiny.llm(speculation, max_num_batched_tokens=16)
    together = texts(llm.generate(prompts, [params(i) for i in range(8)]))
    alone = [texts(llm.generate(prompt, params(i)))[0] for i, prompt in enumerate(prompts)]
    assert together == alone


def _mixed() -> tuple[list[list[int]], list[SamplingParams]]:
    """Each prompt at temperatures 0 and 1: as the plan likes it, with a cap and a weight, and without speculation."""
    wishes = (None, RequestSpeculation(cap=2, weight=3.0), RequestSpeculation(off=True))
    many = [
        (prompt, params(100 + i, temperature=temperature, speculation=wish))
        for i, prompt in enumerate(PROMPTS)
        for temperature in (0.0, 1.0)
        for wish in wishes
    ]
    return [list(prompt) for prompt, _ in many], [p for _, p in many]


@pytest.fixture(scope="module")
def unspeculated(tiny: Tiny) -> list[Any]:
    """Texts of all of them, one by one."""
    llm = tiny.llm("none")
    return [text for prompt, p in zip(*_mixed(), strict=True) for text in texts(llm.generate(prompt, p))]


@pytest.mark.parametrize(
    ("policy", "drafters"),
    [
        (policy, drafters)
        for policy in POLICIES
        for drafters in ("draft:model=DRAFT", "ngram+recycling", "ngram:k=2+recycling")
        if drafters.startswith("draft") or not POLICIES[policy].stops_drafts
    ],
)
def test_every_policy_gives_one_text(tiny: Tiny, unspeculated: list[Any], policy: str, drafters: str) -> None:
    """Twice, so that the second run meets a policy that has learned."""
    llm = tiny.llm(f"{drafters}@{policy}{':k=4' * (policy == 'fixed')}")
    for _ in range(2):
        generations = llm.generate(*_mixed())
        assert texts(generations) == unspeculated
    if policy in ("fixed", "bass", "heuristic"):
        assert sum(o.stats.accepted_tokens for g in generations for o in g.outputs) > 0


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("speculation", ["none", *SPECS[:3]])
def test_four_samples_differ_and_repeat(tiny: Tiny, speculation: str, rule: str) -> None:
    """Four samples of 20 tokens; odds that two agree by chance are far below 1e-6. A repeated call gives the same."""
    first, second = (
        [o.token_ids for o in tiny.llm(speculation, rule=rule).generate(PROMPTS[0], params(7, n=4))[0].outputs]
        for _ in range(2)
    )
    assert len(set(first)) == 4
    assert first == second
    if rule == "coupled":
        assert tiny.llm(speculation).generate(PROMPTS[0], params(7))[0].token_ids == first[0]


@pytest.mark.parametrize("mix", ["plain", "top_p", "temperature", "bias"])
@pytest.mark.parametrize("speculation", ["none", *SPECS])
def test_64_tokens_are_32_and_a_resubmission(tiny: Tiny, speculation: str, mix: str) -> None:
    """(Penalties are left out: they tell the prompt's tokens from the output's, so the resubmission differs.)"""
    llm = tiny.llm(speculation)
    options = MIXES[mix]
    whole = llm.generate(PROMPTS[1], params(5, max_tokens=64, **options))[0].token_ids
    head = llm.generate(PROMPTS[1], params(5, max_tokens=32, **options))[0].token_ids
    tail = llm.generate([*PROMPTS[1], *head], params(5, max_tokens=32, **options))[0].token_ids
    assert len(whole) == 64
    assert head + tail == whole


def test_without_a_seed_it_is_fresh_and_echoed(tiny: Tiny) -> None:
    """Two fresh texts of 20 tokens agree with odds far below 1e-6."""
    llm = tiny.llm("recycling:k=12")
    first, second = (llm.generate(PROMPTS[0], params(None, n=2))[0] for _ in range(2))
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    for fresh in (first, second):
        assert {o.seed for o in fresh.outputs} == {fresh.seed}
        again = tiny.llm("none").generate(PROMPTS[0], params(fresh.seed, n=2))[0]
        assert texts([again]) == texts([fresh])


# Deliberately broken: the comparison must see each of them.


def test_a_rule_that_uses_the_draft_is_caught(tiny: Tiny) -> None:
    """`rejection` is exact in law, but its text depends on the draft."""
    assert sample(tiny.llm("draft:k=3,model=DRAFT", rule="rejection")) != sample(tiny.llm("none"))


def test_noise_of_a_global_generator_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the same law, but noise by call instead of by place."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        "paceline.verify.coupled.draw_target",
        lambda law, _noise, _position, vocab: law.draw(rng.integers(2**32, size=vocab, dtype=np.uint32)),
    )
    assert sample(tiny.llm("ngram:k=4")) != sample(tiny.llm("ngram:k=4"))


def test_noise_of_the_relative_position_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keyed by the output's length, a resubmission would start over with the first noise."""
    real = coupled.draw_target

    def generate(prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        shifted = lambda law, noise, position, vocab: real(law, noise, position - len(prompt), vocab)  # noqa: E731
        monkeypatch.setattr(coupled, "draw_target", shifted)
        return tiny.llm("none").generate(list(prompt), params(5, max_tokens=max_tokens))[0].token_ids

    whole = generate(PROMPTS[1], 64)
    assert generate([*PROMPTS[1], *whole[:32]], 32) != whole[32:]


# The real model


@pytest.mark.real_model
def test_real_model_one_text_for_one_seed(real_model: LoadedModel, dropped: Path) -> None:
    """Temperature 1 in fp32: none, ngram, recycling and draft; alone and in a batch of eight; and resubmitted."""
    llm = real_llm(real_model)
    prompts = chat_prompts(llm)
    prompts += [p[:-3] for p in prompts]
    mixes = [{}, {"top_p": 0.9}, {"top_k": 20, "temperature": 0.8}, {"repetition_penalty": 1.2, "min_p": 0.05}] * 2
    many = [SamplingParams(seed=i, max_tokens=16, **mix) for i, mix in enumerate(mixes)]
    expected = texts(llm.generate(prompts, many))
    assert texts(llm.generate(prompts[0], many[0])) == expected[:1]
    for i, spec in enumerate(("ngram:k=4", "recycling:k=6", f'draft:k=2,model="{dropped}"')):
        speculating = real_llm(real_model, spec)
        assert texts(speculating.generate(prompts, many)) == expected
        assert texts(speculating.generate(prompts[i], many[i])) == expected[i : i + 1]
        head = expected[0][0][:8]
        tail = speculating.generate([*prompts[0], *head], SamplingParams(seed=0, max_tokens=8))[0].token_ids
        assert head + tail == expected[0][0][:16]
