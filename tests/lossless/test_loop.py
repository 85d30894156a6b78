"""E2: the joint law of the first two tokens over the full engine loop equals the model's own, whatever speculates.

A test draws 20,480 samples (1,536 for every policy in the quick run) of one prompt at temperature above 0 through the
real engine (scheduler, paged cache, drafters, policy, trim, rule, commit) on a tiny model, and compares with the exact
joint law from the model's logits by chi-square. Samples of one seed differ in their sample index only; their
independence is tested beside the law. Seeds are fixed, so a test either always passes or always fails (policies with a
cost model read the clock, so there the runs differ); the odds of a false alarm are 1e-6 per assertion, two assertions
per test. `pytest -s` shows the p-values.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from lossless.loop import FALSE_ALARM, Runs, Tiny, exact_joint, make_tiny, run

from paceline import LLM, SamplingParams
from paceline.engine.draft_tree import DraftTree
from paceline.engine.rng import Noise
from paceline.engine.types import Candidates, DraftBatch, ScheduledBatch, SpecPlan, Walk
from paceline.plan.base import LengthPolicy
from paceline.plan.registry import POLICIES
from paceline.verify import rejection
from paceline.verify.base import ROOT
from paceline.verify.coupled import CoupledRule, draw_target

RUNS = 20_480
FEW = 1_536
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "penalties": {"presence_penalty": 0.8, "repetition_penalty": 1.3, "min_tokens": 2, "logit_bias": {1: 0.7}},
}
SPECS = (
    "none",
    "ngram:k=2",
    "ngram@auto",
    "recycling:k=4",
    "recycling@auto",
    "suffix:k=4",
    "suffix@auto",
    "ngram:k=2+recycling:k=4",
    "draft:k=2,model=DRAFT",
    "draft:k=2,guess=ngram,model=DRAFT",
    "ouroboros:k=8,model=DRAFT",
    "ouroboros:k=8,phrases=2,suffixes=1,reuse=0,model=DRAFT",
    "s3d:k=3,ends=1",
    "easyspec:k=2,group=2,model=DRAFT",
    "magicdec:k=2,budget=32",
    "rapid:k=2,start=1,chunk=1,budget=1,question=1,model=DRAFT",
    "ngram:k=2+recycling:k=4@priced",
    "ngram:k=1+draft:k=2,model=DRAFT@priced",
    "ngram+recycling+draft:model=DRAFT@auto",
)
"""`priced` is policy `fixed` with a price per node, so that `trim` cuts in many steps, whatever the clock says."""
FAST = (
    ("ngram:k=2+recycling:k=4@priced", "rejection", "penalties"),
    ("recycling:k=4", "coupled", "top_p"),
    ("draft:k=2,model=DRAFT", "rejection", "top_k"),
    ("ouroboros:k=8,model=DRAFT", "coupled", "temperature"),
    ("s3d:k=3,ends=1", "rejection", "temperature"),
)
POLICY_SPECS = [
    f"{drafters}@{policy}{':k=2' * (policy == 'fixed')}"
    for policy in POLICIES
    for drafters in ("ngram+recycling", "draft:model=DRAFT")[POLICIES[policy].stops_drafts :]
]
SLOW = [
    case for case in itertools.product((*SPECS, *POLICY_SPECS), ("coupled", "rejection"), OPTIONS) if case not in FAST
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("draft"))


class _Floor:
    """Nodes of survival below 0.2 are not worth their slot."""

    def size(self, candidates: Candidates) -> int:
        """How many are."""
        return int((candidates.survival >= 0.2).sum())


class _Priced:
    """A policy with such a price."""

    def __init__(self, inner: LengthPolicy) -> None:
        self._inner = inner
        self.learn = inner.learn
        self.forget = inner.forget

    def plan(self, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
        """The inner plan, cut."""
        return dataclasses.replace(self._inner.plan(batch, max_model_len), cut=_Floor())


def _llm(tiny: Tiny, speculation: str, rule: str) -> LLM:
    spec, _, policy = speculation.partition("@")
    if policy != "priced":
        return tiny.llm(speculation, rule=rule)
    llm = tiny.llm(spec, rule=rule)
    stages = llm.engine.stages
    assert stages.policy is not None
    llm.engine.stages = dataclasses.replace(stages, policy=_Priced(stages.policy))
    return llm


@pytest.mark.parametrize(
    ("speculation", "rule", "options"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_the_joint_law_of_two_tokens(tiny: Tiny, speculation: str, rule: str, options: str) -> None:
    params = OPTIONS[options]
    runs = run(_llm(tiny, speculation, rule), params, RUNS)
    law = runs.law_p_value(exact_joint(tiny.plain, SamplingParams(max_tokens=9, **params)))
    independence = runs.independence_p_value()
    print(f"{speculation} {rule} {options}: p={law:.3g}, independence p={independence:.3g}, ", end="")
    print(f"accepted {runs.accepted} of {runs.drafted} drafted")
    assert law > FALSE_ALARM
    assert independence > FALSE_ALARM
    if not any(policy in speculation for policy in ("none", "auto", "smartspec", "threshold")):
        assert runs.accepted > RUNS // 50, "too few drafts were accepted for the test to mean anything"


@pytest.mark.parametrize("speculation", POLICY_SPECS)
def test_the_joint_law_under_every_policy(tiny: Tiny, speculation: str) -> None:
    """Under `rejection`, with few samples; the long suite has all options, both rules and the full number."""
    runs = run(_llm(tiny, speculation, "rejection"), {}, FEW)
    law = runs.law_p_value(exact_joint(tiny.plain, SamplingParams(max_tokens=9)))
    print(f"{speculation}: p={law:.3g}, accepted {runs.accepted} of {runs.drafted} drafted")
    assert law > FALSE_ALARM
    if any(policy in speculation for policy in ("fixed", "bass", "heuristic")):
        assert runs.accepted > FEW // 50, "too few drafts were accepted for the test to mean anything"


def test_the_law_is_not_degenerate(tiny: Tiny) -> None:
    """Otherwise a wrong law would pass: no first token takes more than half, and most pairs are likely enough."""
    joint = exact_joint(tiny.plain, SamplingParams())
    assert joint.sum() == pytest.approx(1.0)
    assert joint.sum(axis=1).max() < 0.5
    assert (joint * RUNS > 20).sum() > 32


# Deliberately broken: the same chi-square must see each of them, with fewer runs.

FEWER = 4096


class _Greedy(CoupledRule):
    """Accepts a child because it is likely (p > 0.3), without asking whether it was drawn."""

    def accept(self, tree: DraftTree, law: Any, noise: Any, position: int, vocab_size: int) -> Walk:
        likely = law(ROOT, ()).probabilities(vocab_size) > 0.3
        for child in tree.children()[0]:
            if likely[tree.tokens[child]]:
                token = int(tree.tokens[child])
                return Walk((child,), (token, draw_target(law(child, (token,)), noise, position + 1, vocab_size)))
        return super().accept(tree, law, noise, position, vocab_size)


def _without_unlikely(tree: DraftTree) -> DraftTree:
    """Cuts a sampled chain at tokens that their own law finds unlikely, after they were drawn."""
    pairs = zip(tree.tokens, tree.laws or (), strict=True)
    likely = [bool(law.probabilities(8)[token] > 0.25) for token, law in pairs]
    return tree.keep(np.arange(likely.index(False) if False in likely else len(likely)))


@pytest.mark.parametrize("speculation", ["suffix:k=4", "recycling:k=6"])
@pytest.mark.parametrize("rule", ["rejection", "recursive", "multi"])
def test_a_seed_that_comes_again_is_a_new_draw(tiny: Tiny, speculation: str, rule: str) -> None:
    """A drafter remembers what the seed gave before: the same noise must not judge it."""
    llm = tiny.llm(speculation, rule=rule)
    first, again = run(llm, {}, 768), run(llm, {}, 768)
    assert again.law_p_value(exact_joint(tiny.plain, SamplingParams(max_tokens=9))) > FALSE_ALARM
    both = np.stack([first.tokens[..., 0].ravel(), again.tokens[..., 0].ravel()], axis=1).reshape(1, -1, 1)
    assert Runs(both, 0, 0).independence_p_value() > FALSE_ALARM


def test_without_drafts_one_seed_is_one_text(tiny: Tiny) -> None:
    llm = tiny.llm("none", rule="rejection")
    first, again = run(llm, {}, 256), run(llm, {}, 256)
    assert np.array_equal(first.tokens, again.tokens)


def test_a_broken_coupled_rule_is_caught(tiny: Tiny) -> None:
    llm = tiny.llm("recycling:k=4")
    llm.engine.stages = dataclasses.replace(llm.engine.stages, rule=_Greedy())
    assert run(llm, {}, FEWER).law_p_value(exact_joint(tiny.plain, SamplingParams())) < FALSE_ALARM


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        pytest.param("residual", lambda p, _q: p, id="residual not subtracted"),
        pytest.param("accepts", lambda p, q, _u: p >= q, id="accepts if p >= q", marks=pytest.mark.slow),
    ],
)
def test_a_broken_rejection_rule_is_caught(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, function: str, wrong: Any
) -> None:
    monkeypatch.setattr(rejection, function, wrong)
    runs = run(tiny.llm("draft:k=2,model=DRAFT", rule="rejection"), {}, FEWER)
    assert runs.law_p_value(exact_joint(tiny.plain, SamplingParams())) < FALSE_ALARM


def test_dropping_sampled_tokens_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny.llm("draft:k=2,model=DRAFT", rule="rejection")
    drafting = llm.engine.stages.drafting
    real = drafting.draft

    def draft(*arguments: Any) -> DraftBatch:
        made = real(*arguments)
        return dataclasses.replace(made, drafted=tuple(_without_unlikely(tree) for tree in made.trees))

    monkeypatch.setattr(drafting, "draft", draft)
    assert run(llm, {}, FEWER).law_p_value(exact_joint(tiny.plain, SamplingParams())) < FALSE_ALARM


def test_samples_that_share_noise_are_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that forgets the sample index gives n times the same text; the independence test must fail."""
    monkeypatch.setattr("paceline.engine.request.Noise", lambda seed, _sample_index: Noise(seed, 0))
    assert run(tiny.llm("none"), {}, FEWER).independence_p_value() < FALSE_ALARM
