"""E0: greedy text is the same, token for token and to the same length, whatever speculates (SmolLM2-135M).

In fp32 every drafter must give exactly the text of `none`, alone and in a mixed batch. In bf16 the rounding of kernels
depends on the batch's shape, so near-ties may fall either way: each divergence is explained, or the test fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import save_heads, with_head
from lossless.real import chat_prompts, divergence, real_llm, shape_noise, spec_bench

from paceline import LLM, SamplingParams
from paceline.engine.sampling import Law
from paceline.engine.types import DraftTree, Walk
from paceline.model.loader import LoadedModel
from paceline.outputs import Generation
from paceline.plan.registry import POLICIES
from paceline.verify.coupled import CoupledRule

pytestmark = pytest.mark.real_model
SPECS = (
    "ngram:k=5",
    "recycling:k=24",
    "suffix:k=16",
    "prediction:k=8",
    "draft:k=4,model=smollm2-135m",
    "draft:k=2,model=DROPPED",
    "draft:k=4,guess=ngram,model=DROPPED",
    "ouroboros:k=12,model=DROPPED",
    "easyspec:k=3,group=4,model=DROPPED",
    "layerskip:k=3,skip=12-15",
    "magicdec:k=3,budget=32",
    "s3d:k=2,ends=12",
    "rapid:k=4,model=self,start=8,chunk=8,budget=16,question=16",
    "ngram:k=4+recycling:k=16+suffix:k=16+prediction:k=4",
    "auto",
    "ngram+draft:model=DROPPED@auto",
)
NUM_QUESTIONS = 20
LONG = 256
SHORT = 64


@pytest.fixture(scope="module")
def prompts(real_model: LoadedModel) -> list[list[int]]:
    return chat_prompts(real_llm(real_model))


@pytest.fixture(scope="module")
def expected(real_model: LoadedModel, prompts: list[list[int]]) -> list[Generation]:
    """Without speculation, one prompt at a time."""
    llm = real_llm(real_model)
    return [llm.generate(p, _params(SHORT))[0] for p in prompts]


def _params(max_tokens: int, prediction: str | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, prediction=prediction)


def _predicted(expected: Sequence[Generation], max_tokens: int) -> list[SamplingParams]:
    """A prediction that is right except for its middle word."""
    halves = [g.text.partition(" ") for g in expected]
    texts = [a + " however" + c[: len(c) // 2] + " perhaps" + c[len(c) // 2 :] for a, _, c in halves]
    return [_params(max_tokens, text or None) for text in texts]


def _run(llm: LLM, prompts: Sequence[Sequence[int]], expected: Sequence[Generation], tokens: int) -> list[Generation]:
    return llm.generate([list(p) for p in prompts], _predicted(expected, tokens))


def _same(found: Sequence[Generation], expected: Sequence[Generation]) -> list[bool]:
    return [
        (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        for a, b in zip(found, expected, strict=True)
    ]


def test_none_in_a_batch(real_model: LoadedModel, prompts: list[list[int]], expected: list[Generation]) -> None:
    found = real_llm(real_model).generate(prompts, _params(SHORT))
    assert all(_same(found, expected))


@pytest.mark.parametrize("spec", SPECS)
def test_fp32_text_is_the_same(
    real_model: LoadedModel, dropped: Path, prompts: list[list[int]], expected: list[Generation], spec: str
) -> None:
    """A mixed batch of four, then one of the four alone (another one for every drafter)."""
    llm = real_llm(real_model, spec.replace("DROPPED", f'"{dropped}"'))
    batch = _run(llm, prompts, expected, SHORT)
    assert all(_same(batch, expected))
    one = slice(SPECS.index(spec) % 4, SPECS.index(spec) % 4 + 1)
    alone = _run(llm, prompts[one], expected[one], SHORT)
    assert all(_same(alone, expected[one]))
    if "auto" not in spec:
        assert sum(g.stats.accepted_tokens for g in (*batch, *alone)) > 0, "nothing was accepted, so nothing is tested"


@pytest.mark.parametrize("policy", sorted({*POLICIES} - {"auto", "fixed"}))
def test_fp32_text_is_the_same_under_every_policy(
    real_model: LoadedModel, prompts: list[list[int]], expected: list[Generation], policy: str, tmp_path: Path
) -> None:
    """The others beside `auto` and `fixed`: the first 16 tokens, in a batch of four."""
    named = with_head(policy, save_heads(tmp_path, int(real_model.config.hidden_size)))
    drafters = "draft:model=builtin,max=8" if POLICIES[policy].stops_drafts else "ngram:max=4+recycling:max=12"
    llm = real_llm(real_model, f"{drafters}@{named}")
    found = llm.generate(prompts, _params(16))
    assert [g.token_ids for g in found] == [g.token_ids[:16] for g in expected]
    assert sum(g.stats.accepted_tokens for g in found) > 0 or POLICIES[policy].priced


class _Credulous(CoupledRule):
    """Broken: takes the first two draft tokens whatever the target says."""

    def accept(self, tree: DraftTree, law: Any, noise: Any, position: int, vocab_size: int) -> Walk:
        def nearly(node: int, path: Sequence[int]) -> Law:
            drafted = [int(tree.tokens[child]) for child in tree.children()[node + 1]]
            return Law.point(drafted[0]) if drafted and len(path) < 2 else law(node, path)

        return super().accept(tree, nearly, noise, position, vocab_size)


def test_a_rule_that_trusts_the_draft_is_caught(
    real_model: LoadedModel, prompts: list[list[int]], expected: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.verify.accept._ARGMAX_MATCH", _Credulous())
    found = real_llm(real_model, "recycling:k=4").generate(prompts, _params(SHORT))
    assert not all(_same(found, expected))


def test_a_text_cut_short_is_caught(expected: list[Generation]) -> None:
    """Lengths are compared too: no `zip` hides a missing tail."""
    first = expected[0].outputs[0]
    cut = replace(first, token_ids=first.token_ids[:-1])
    assert _same(expected[:1], expected[:1]) == [True]
    assert _same([replace(expected[0], outputs=(cut,))], expected[:1]) == [False]


# The long suites: Spec-Bench prompts, 256 tokens each. Their reference runs without speculation in batches of eight.

SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]
CASES = [pytest.param(spec, batch, marks=SLOW) for batch in (8, 1) for spec in SPECS]
ROOM = {"max_model_len": 2048, "kv_cache_memory": 512 << 20}


@dataclass(frozen=True)
class Reference:
    """A model's prompts and its text without speculation."""

    loaded: LoadedModel
    prompts: list[list[int]]
    expected: list[Generation]

    def run(self, speculation: str, batch: int) -> list[Generation]:
        """All prompts with a drafter, `batch` at a time."""
        llm = real_llm(self.loaded, speculation, **ROOM)
        found: list[Generation] = []
        for start in range(0, len(self.prompts), batch):
            some = slice(start, start + batch)
            found += _run(llm, self.prompts[some], self.expected[some], LONG)
        return found


def _reference(loaded: LoadedModel) -> Reference:
    llm = real_llm(loaded, **ROOM)
    prompts = chat_prompts(llm, spec_bench(NUM_QUESTIONS))
    return Reference(
        loaded, prompts, [g for i in range(0, len(prompts), 8) for g in llm.generate(prompts[i : i + 8], _params(LONG))]
    )


@pytest.fixture(scope="module")
def fp32(real_model: LoadedModel) -> Reference:
    return _reference(real_model)


@pytest.fixture(scope="module")
def bf16(real_model_bf16: LoadedModel) -> Reference:
    return _reference(real_model_bf16)


@pytest.mark.parametrize(("spec", "batch"), [pytest.param("none", 1, marks=SLOW), *CASES])
def test_fp32_spec_bench(fp32: Reference, dropped: Path, spec: str, batch: int) -> None:
    same = _same(fp32.run(spec.replace("DROPPED", f'"{dropped}"'), batch), fp32.expected)
    print(f"\nfp32 {spec}, batch {batch}: {sum(same)} of {len(same)} texts are the same")
    assert all(same)


# bf16


@pytest.fixture(scope="module")
def noise(bf16: Reference) -> float:
    """99.9th percentile of how far the gap of the two best logits moves when the same tokens run in another shape."""
    found = shape_noise(
        real_llm(bf16.loaded, **ROOM),
        [(*g.prompt_token_ids, *g.token_ids)[-200:] for g in bf16.expected[::3]],
    )
    print(f"\nbf16 batch-shape noise of the top-2 gap, 99.9th percentile: {found:.4f}")
    return found


@pytest.mark.parametrize(("spec", "batch"), [pytest.param("none", 1, marks=SLOW), *CASES])
def test_bf16_divergences_are_near_ties(
    real_model: LoadedModel, bf16: Reference, noise: float, dropped: Path, spec: str, batch: int
) -> None:
    """Every first divergence from `none` is at a position whose fp32 gap of the two best lies within the noise."""
    exact = real_llm(real_model, **ROOM)
    found = bf16.run(spec.replace("DROPPED", f'"{dropped}"'), batch)
    gaps = [divergence(exact, a, b) for a, b in zip(found, bf16.expected, strict=True)]
    apart = sorted(gap for gap in gaps if gap is not None)
    print(f"\nbf16 {spec}, batch {batch}: {len(apart)} of {len(gaps)} diverge, fp32 gaps {np.round(apart, 4).tolist()}")
    assert all(gap <= noise for gap in apart), f"fp32 gaps {apart} above the noise of {noise:.4f}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_wrong_tokens_are_not_near_ties(real_model: LoadedModel, bf16: Reference, noise: float) -> None:
    """An error that is no rounding is not explained away: most positions have a gap above the noise."""
    exact = real_llm(real_model, **ROOM)
    wrong = [replace(g, outputs=(replace(g.outputs[0], token_ids=(*g.token_ids[:9], 0)),)) for g in bf16.expected]
    gaps = [divergence(exact, a, b) for a, b in zip(wrong, bf16.expected, strict=True)]
    assert sum(gap is not None and gap > noise for gap in gaps) > len(gaps) // 2
