"""RAPID's knowledge transfer is another target, and that target is sampled exactly (2502.20330).

The law is enumerated without error over every draft and every outcome of a rule on a vocabulary of four: its rows come
from the engine's own verifier and transform, what they should be from plain `transformers` forwards and the formula in
fp64. Then the whole engine: texts for every look-ahead, and a chi-square over many runs. The published rule (recovered
and bonus tokens from other laws) and a transform that forgets the last row must be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_config, make_llm, make_loaded, make_model
from lossless.loop import FALSE_ALARM, MAX_TOKENS, PROMPT, Tiny, make_tiny, run
from lossless.loop import VOCAB as LOOP_VOCAB
from lossless.reference import Floats, model_rows

from paceline import LLM, RequestSpeculation, SamplingParams
from paceline.bench.laws import Context, ScriptedLaw, ScriptedNoise, law_of_rounds, outcomes, sampled_chain, tree_of
from paceline.draft.base import chain
from paceline.draft.draft_model import DraftModel
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.rapid import RapidDrafter
from paceline.draft.transfer import KnowledgeTransfer, transferred
from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import Request
from paceline.engine.sampling import Law, build_law
from paceline.engine.types import DraftBatch, ScheduledBatch, ScheduledRequest, TargetScores
from paceline.verify.base import AcceptanceRule
from paceline.verify.registry import create_rule

VOCAB = 4
LONG_PROMPT = (3, 1, 0, 3, 2, 1, 1, 3, 0, 2, 3, 1)
START, QUESTION = 2, 3
READING = f"start={START},chunk=2,budget=4,question={QUESTION}"
SHORT_PROMPT = (*LONG_PROMPT[:START], *LONG_PROMPT[4:6], *LONG_PROMPT[6:8], *LONG_PROMPT[-QUESTION:])
"""With the second and third of four chunks."""
TOLERANCE = 2e-6
"""Of the models' fp32."""
Transform = Callable[[TargetScores, TargetScores, Sequence[DraftTree]], TargetScores]


class _SecondAndThird:
    """A retriever for texts without words."""

    def scores(self, query: str, chunks: Sequence[str]) -> Floats:  # noqa: ARG002
        """Of the middle chunks."""
        return np.array([float(i in (1, 2)) for i in range(len(chunks))])


def _config(vocab: int = VOCAB) -> Any:
    return make_config(vocab_size=vocab, num_hidden_layers=1, initializer_range=0.4, pad_token_id=0, eos_token_id=2)


def _formula(z: Floats, d: Floats, strength: float) -> Floats:
    """The declared target's logits, token by token."""
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (z, d))
    return np.array([z[t] - strength * (p[t] - q[t]) if q[t] >= 0.1 * q.max() else z[t] for t in range(len(z))])


@dataclass(frozen=True)
class Pair:
    """An engine whose target and draft have plain twins."""

    llm: LLM
    strength: float
    target: torch.nn.Module
    draft: torch.nn.Module

    def draft_law(self, context: Context) -> Law:
        """What the draft model says after the short prompt and a context."""
        return ScriptedLaw(model_rows(self.draft, [*SHORT_PROMPT, *context])[-1].astype(np.float64))

    def declared(self, context: Context) -> Floats:
        """The declared target's law by its definition.  # [vocab]"""
        z = model_rows(self.target, [*LONG_PROMPT, *context])[-1].astype(np.float64)
        d = model_rows(self.draft, [*SHORT_PROMPT, *context])[-1].astype(np.float64)
        logits = _formula(z, d, self.strength)
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def _pair(folder: Any, strength: float) -> Pair:
    loaded = make_loaded(vocab_size=VOCAB, num_hidden_layers=1, initializer_range=0.4)
    draft = make_model(_config(), seed=5, attention="eager")
    draft.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    llm = make_llm(loaded, speculation=f'rapid:k=1,{READING},transfer={strength},model="{folder}"')
    (drafter,) = llm.engine.stages.drafting.drafters.values()
    assert isinstance(drafter, RapidDrafter)
    drafter.reading.retriever = _SecondAndThird()
    return Pair(llm, strength, make_model(_config(), attention="eager"), draft)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Pair]:
    return cache(lambda strength: _pair(tmp_path_factory.mktemp("draft"), strength))


def _scores(llm: LLM, context: Context, tree: DraftTree) -> TargetScores:
    """What the engine's verifier says of a tree after some output."""
    blocks = llm.engine.stages.scheduler.blocks
    request = Request("r", [*LONG_PROMPT, *context], len(LONG_PROMPT), SamplingParams(), 0)
    assert blocks.grow(request.blocks, len(request.token_ids) + len(tree))
    try:
        batch = ScheduledBatch((ScheduledRequest(request, 0, len(request.token_ids), True),))
        scores = llm.engine.stages.verifier.verify(batch, DraftBatch((tree,)))
        assert not scores.errors
        return scores
    finally:
        blocks.release(request.blocks)
        llm.engine.stages.drafting.forget(request)


def _committed(pair: Pair, rule: AcceptanceRule, length: int, looked_ahead: int) -> Floats:
    """Joint law of the first tokens over every draft and every outcome of the rule.  # [vocab] * length"""
    draft = sampled_chain(cache(pair.draft_law), looked_ahead)

    @cache
    def rows(context: Context, tokens: Context) -> np.ndarray:
        return _scores(pair.llm, context, tree_of(chain(tokens, [0] * len(tokens)))).host

    @cache
    def one_round(context: Context) -> tuple[tuple[float, Context], ...]:
        def play(choices: Any) -> Context:
            noise: Any = ScriptedNoise(choices)
            tree = tree_of(draft(context, noise, len(context)))
            logits = rows(context, tuple(tree.tokens.tolist()))

            def law(node: int, path: Sequence[int]) -> Law:
                made = build_law(logits[node + 1], SamplingParams(), [], [*context, *path])
                return ScriptedLaw(made.logits, made.ids)

            return rule.accept(tree, law, noise, len(context), VOCAB).tokens

        return tuple(outcomes(play))

    return law_of_rounds(one_round, VOCAB, length)


def _declared(pair: Pair, length: int) -> Floats:
    joint = np.zeros((VOCAB,) * length)
    laws = cache(pair.declared)
    for context in np.ndindex(*joint.shape):
        joint[context] = np.prod([laws(context[:i])[token] for i, token in enumerate(context)])
    return joint


def _error(pair: Pair, rule: str, length: int, looked_ahead: int) -> float:
    found = _committed(pair, create_rule(rule), length, looked_ahead)
    return float(np.abs(found - _declared(pair, length)).max())


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("looked_ahead", [0, 1, 2])
@pytest.mark.parametrize("strength", [0, 1, 10])
def test_the_committed_law_is_the_declared_one(
    pairs: Callable[[float], Pair], strength: float, looked_ahead: int, rule: str
) -> None:
    """The first two tokens, from one draft or several."""
    assert _error(pairs(strength), rule, 2, looked_ahead) < TOLERANCE


@pytest.mark.slow
def test_three_tokens_from_one_draft(pairs: Callable[[float], Pair]) -> None:
    assert _error(pairs(10), "rejection", 3, 2) < TOLERANCE


def test_the_declared_laws_differ(pairs: Callable[[float], Pair]) -> None:
    """Otherwise equality would say nothing about the strength."""
    one, two, three = (_declared(pairs(strength), 2) for strength in (0, 1, 10))
    assert min(np.abs(a - b).max() for a, b in ((one, two), (two, three), (one, three))) > 0.01


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Transform], None]:
    """Puts something else in place of what the transform made, given the model's own scores."""
    real = KnowledgeTransfer.apply

    def install(change: Transform) -> None:
        def apply(self: KnowledgeTransfer, batch: Any, drafts: DraftBatch, scores: TargetScores) -> TargetScores:
            return change(real(self, batch, drafts, scores), scores, drafts.trees)

        monkeypatch.setattr(KnowledgeTransfer, "apply", apply)

    return install


def _plain_bonus(made: TargetScores, own: TargetScores, trees: Sequence[DraftTree]) -> TargetScores:
    """The row after a draft's last token stays the model's own."""
    logits = made.logits.clone()
    for row, tree in zip(made.first_row, trees, strict=True):
        logits[row + len(tree)] = own.logits[row + len(tree)]
    return replace(made, logits=logits)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_a_bonus_from_the_plain_target_is_caught(
    pairs: Callable[[float], Pair], broken: Callable[[Transform], None], rule: str
) -> None:
    broken(_plain_bonus)
    assert _error(pairs(10), rule, 2, 1) > 0.01


def test_the_published_residual_is_not_the_declared_law(pairs: Callable[[float], Pair]) -> None:
    """One drafted token: accepted by min(1, p'/q), else from norm(max(p - q, p - p')+), which is no declared law."""
    pair = pairs(10)
    declared, q = pair.declared(()), pair.draft_law(()).probabilities(VOCAB)
    own = np.exp(model_rows(pair.target, LONG_PROMPT)[-1].astype(np.float64))
    own /= own.sum()
    kept = np.minimum(declared, q)
    left = np.maximum(np.maximum(own - q, own - declared), 0.0)
    law = kept + (1.0 - kept.sum()) * left / left.sum()
    assert np.abs(law - declared).max() > 0.01


def test_strength_zero_leaves_the_logits_alone() -> None:
    z, d = torch.randn(3, 9), torch.randn(3, 9)
    assert torch.equal(transferred(z, d, 0.0), z)


def test_the_formula() -> None:
    """Against token by token, with tokens that the draft cannot say."""
    rng = np.random.default_rng(0)
    for strength in (0.5, 3.0, 20.0):
        z, d = rng.normal(0, 2, 12), rng.normal(0, 2, 12)
        d[[2, 7]] = -np.inf
        found = transferred(torch.from_numpy(z)[None], torch.from_numpy(d)[None], strength)[0].numpy()
        assert np.allclose(found, _formula(z, d, strength), atol=1e-12)


# The whole engine

FAST = "start=1,chunk=1,budget=1,question=1"
LOOKS = (
    f"rapid:k=1,{FAST},model=DRAFT,transfer=10",
    f"rapid:k=4,{FAST},model=DRAFT,transfer=10",
    f"ngram:k=4+rapid:k=2,{FAST},model=DRAFT,transfer=10",
    f"recycling+rapid:{FAST},model=DRAFT,transfer=10@auto",
)
PROMPTS = ([3, 4, 5, 3, 4], [7, 8, 9, 7, 8, 9, 7], [11] * 20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("draft"), vocab_size=48, num_hidden_layers=2)


def _params(seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_tokens": 20, "ignore_eos": True, **options})


def _texts(llm: LLM, **options: Any) -> list[Any]:
    """Tokens at temperatures 0 and 1, some with options; they must be labelled."""
    mixes = ({"temperature": 0.0}, {}, {"top_p": 0.8, "presence_penalty": 0.5})
    jobs = [(list(p), _params(i, **mix, **options)) for i, p in enumerate(PROMPTS) for mix in mixes]
    found = [g.outputs[0] for g in llm.generate([p for p, _ in jobs], [p for _, p in jobs])]
    assert [o.error for o in found] == [None] * len(jobs)
    assert {o.stats.target_transform for o in found} <= {"rapid:transfer=10", None}
    return [(o.token_ids, o.text) for o in found]


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> list[Any]:
    """Without any look-ahead."""
    return _texts(tiny.llm(LOOKS[0]), speculation=RequestSpeculation(off=True))


def test_one_text_whatever_looks_ahead(tiny: Tiny, expected: list[Any]) -> None:
    for speculation in LOOKS:
        assert _texts(tiny.llm(speculation)) == expected, speculation
    for tree in ("branching:widths=2/2", "rsd-s:width=3"):
        assert _texts(tiny.llm(LOOKS[1].replace("k=4", "max=8"), tree=tree)) == expected, tree
    assert expected != _texts(tiny.llm("none")), "the transform does nothing"


def test_one_text_in_little_memory(tiny: Tiny, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are preempted, and take turns in the draft model's cache."""
    llm = tiny.llm(LOOKS[1], max_num_seqs=8, max_model_len=48, kv_cache_memory=20 << 10, block_size=4)
    evict, turns = DraftModel.evict, list[int]()
    monkeypatch.setattr(DraftModel, "evict", lambda self: turns.append(1) or evict(self))
    assert _texts(llm) == expected
    assert turns, "everybody had room"


def test_one_text_when_the_drafter_has_died(tiny: Tiny, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its work: what its cache then holds must not be trusted."""
    calls = iter(range(1000))
    real = ModelDrafter._extend

    def extend(self: ModelDrafter, tree: Any) -> None:
        if next(calls) == 25:
            raise MemoryError("no more drafts")
        real(self, tree)

    monkeypatch.setattr(ModelDrafter, "_extend", extend)
    llm = tiny.llm(LOOKS[1])
    assert _texts(llm) == expected
    assert not llm.engine.stages.drafting.drafters


def test_one_text_when_a_draft_forward_has_failed(
    tiny: Tiny, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV that was never written is not taken for written."""
    llm = tiny.llm(LOOKS[1])
    (drafter,) = llm.engine.stages.drafting.drafters.values()
    assert isinstance(drafter, RapidDrafter)
    real, calls, runner = drafter.model.runner.forward, iter(range(1000)), drafter.model.runner

    def forward(batch: Any) -> Any:
        if next(calls) == 10:
            raise MemoryError("once")
        return real(batch)

    monkeypatch.setattr(runner, "forward", forward)
    assert _texts(llm) == expected


def test_log_probabilities_are_those_of_the_declared_target(tiny: Tiny) -> None:
    first, second = (tiny.llm(look).generate(PROMPTS[0], _params(3, logprobs=2)).pop().logprobs for look in LOOKS[:2])
    own = tiny.llm("none").generate(PROMPTS[0], _params(3, logprobs=2)).pop().logprobs
    assert first is not None
    assert second is not None
    assert own is not None
    assert np.allclose([x.logprob for x in first], [x.logprob for x in second], atol=1e-4)
    assert abs(first[0].logprob - own[0].logprob) > 1e-3 or first[0].top[0] != own[0].top[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("draft"))


def _joint(small: Tiny, strength: float) -> Floats:
    """Of the first two tokens, from plain forwards; the draft reads three tokens of the prompt.  # [vocab, vocab]"""
    from transformers import AutoModelForCausalLM

    draft = AutoModelForCausalLM.from_pretrained(small.draft, attn_implementation="eager").eval()
    short = [PROMPT[0], PROMPT[1], PROMPT[-1]]

    def law(context: Sequence[int]) -> Floats:
        z, d = (model_rows(m, [*p, *context])[-1] for m, p in ((small.plain, PROMPT), (draft, short)))
        logits = _formula(z.astype(np.float64), d.astype(np.float64), strength)
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    return law([])[:, None] * np.stack([law([t]) for t in range(LOOP_VOCAB)])


@pytest.fixture
def sampled(small: Tiny) -> Callable[[str], float]:
    """p-value of 1,024 runs at strength 10 against the declared joint law. The second token is the bonus of a draft of
    one, or the first of another step."""
    joint = _joint(small, 10.0)

    def measure(rule: str) -> float:
        runs = run(small.llm(f"rapid:k=1,{FAST},model=DRAFT,transfer=10", rule=rule), {}, 1024)
        assert runs.accepted > 400
        return runs.law_p_value(joint)

    assert MAX_TOKENS == 3
    return measure


ONE_SLOW = ["rejection", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("coupled", "recursive", "multi"))]


@pytest.mark.parametrize("rule", ONE_SLOW)
def test_the_joint_law_of_two_tokens_over_the_loop(sampled: Callable[[str], float], rule: str) -> None:
    assert sampled(rule) > FALSE_ALARM


@pytest.mark.parametrize("rule", ONE_SLOW)
def test_over_the_loop_a_plain_bonus_is_caught(
    sampled: Callable[[str], float], broken: Callable[[Transform], None], rule: str
) -> None:
    broken(_plain_bonus)
    assert sampled(rule) < FALSE_ALARM
