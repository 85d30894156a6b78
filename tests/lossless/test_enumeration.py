"""E1: `rejection` commits exactly the target's law, by full enumeration on tiny vocabularies (error below 1e-12).

The rule's own code runs, over several rounds of drafting and verifying. The same checker rejects deliberately broken
rules and drafters, among them those that published code gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paceline.bench.laws import (
    Choices,
    Context,
    Draft,
    LawOf,
    ScriptedLaw,
    ScriptedNoise,
    chosen_chain,
    committed_law,
    error_of,
    outcomes,
    random_laws,
    sampled_chain,
    tree_of,
)
from paceline.config import SamplingParams
from paceline.draft.base import NOTHING, Proposal, chain
from paceline.engine.sampling import Law
from paceline.verify import rejection
from paceline.verify.coupled import CoupledRule
from paceline.verify.rejection import RejectionRule

EXACT = 1e-12
BROKEN = 1e-3
WARPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.3},
    "penalties": {"presence_penalty": 0.7, "repetition_penalty": 1.3, "logit_bias": {0: 0.5}, "min_tokens": 2},
    "greedy": {"temperature": 0.0},
}


def entropy(law: Law) -> float:
    p = law.probabilities(9)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def likeliest(q: LawOf) -> Callable[[Context], int]:
    return lambda context: int(q(context).probabilities(9).argmax())


def test_the_enumeration_itself() -> None:
    """Probabilities sum to one, every branch is seen once, and a scripted draw has its law's probabilities."""
    law = ScriptedLaw(np.log(np.array([0.5, 0.2, 0.3])))

    def run(choices: Choices) -> tuple[int, bool]:
        token = law.draw(choices)
        return token, bool(ScriptedNoise(choices).uniform(0, rejection.Stream.ACCEPT) * 0.5 < 0.1 * token)

    found = {result: probability for probability, result in outcomes(run)}
    assert found == pytest.approx(
        {(0, False): 0.5, (1, False): 0.16, (1, True): 0.04, (2, False): 0.18, (2, True): 0.12}
    )


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize(("vocab", "depth"), [(2, 3), (3, 1), (3, 2), (3, 3), (4, 2), (5, 1)])
def test_sampled_drafts(warp: str, vocab: int, depth: int) -> None:
    """Target and draft under the same options: joint law of the first two and three tokens."""
    params = SamplingParams(**WARPS[warp])
    for seed in range(2):
        p, q = random_laws(seed, vocab, params), random_laws(seed + 100, vocab, params)
        assert error_of(RejectionRule(), p, sampled_chain(q, depth), vocab, length=3 if vocab < 5 else 2) < EXACT


def test_sampled_drafts_on_five_tokens_three_deep() -> None:
    p, q = (random_laws(seed, 5, SamplingParams()) for seed in (1, 2))
    assert error_of(RejectionRule(), p, sampled_chain(q, 3), 5, length=2) < EXACT


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("vocab", [2, 3, 5])
def test_chosen_drafts(warp: str, vocab: int) -> None:
    """Deterministic tokens are point masses; the draft may be good (its likeliest) or never right."""
    p = random_laws(5, vocab, SamplingParams(**WARPS[warp]))
    q = random_laws(6, vocab, SamplingParams())
    never = lambda context: int(p(context).probabilities(vocab).argmin())  # noqa: E731
    for choose in (likeliest(p), likeliest(q), never):
        for depth in (1, 3):
            assert error_of(RejectionRule(), p, chosen_chain(choose, depth), vocab, length=3) < EXACT


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 2}, {"min_p": 0.5}], ids=str)
def test_a_draft_that_cannot_say_some_tokens(options: dict[str, Any]) -> None:
    """q is zero where p is positive (a vocabulary subset, a harder cut than the target's), and the other way round."""
    wide, narrow = random_laws(7, 4, SamplingParams()), random_laws(8, 4, SamplingParams(**options))
    assert error_of(RejectionRule(), wide, sampled_chain(narrow, 2), 4, length=3) < EXACT
    assert error_of(RejectionRule(), narrow, sampled_chain(wide, 2), 4, length=3) < EXACT


def test_a_perfect_draft_is_always_accepted() -> None:
    p = random_laws(9, 3, SamplingParams())
    assert error_of(RejectionRule(), p, sampled_chain(p, 2), 3, length=3) < EXACT
    laws = p(()), p((1,))
    tree = chain([1, 2], [0, 0], laws)

    def run(choices: Choices) -> tuple[int, ...]:
        noise: Any = ScriptedNoise(choices)
        return RejectionRule().accept(tree_of(tree), lambda _n, path: p(tuple(path)), noise, 0, 3).path

    assert {path for probability, path in outcomes(run) if probability > 0} == {(0, 1)}


def test_a_stop_that_looks_only_at_the_next_law_is_exact() -> None:
    """SVIP's entropy stop: the decision is made before the token is drawn."""
    p, q = random_laws(10, 3, SamplingParams()), random_laws(13, 3, SamplingParams())
    stop = sampled_chain(q, 3, before=lambda law: entropy(law) > 0.8)
    lengths = {length for _, length in outcomes(lambda choices: len(stop((), ScriptedNoise(choices), 0)))}
    assert len(lengths) > 1, "the stop never depends on what was drawn, so nothing is tested"
    assert error_of(RejectionRule(), p, stop, 3, length=3) < EXACT


def test_coupled_with_fresh_target_draws() -> None:
    """`coupled` on a draft that is independent of the target's draw: sample-then-match."""
    for warp in WARPS.values():
        p, q = random_laws(12, 3, SamplingParams(**warp)), random_laws(13, 3, SamplingParams())
        for draft in (sampled_chain(q, 2), chosen_chain(likeliest(q), 3)):
            assert error_of(CoupledRule(), p, draft, 3, length=3) < EXACT


# Deliberately broken: the checker must see each of them.

P, Q = random_laws(20, 3, SamplingParams()), random_laws(21, 3, SamplingParams())
SAMPLED = sampled_chain(Q, 2)
CHOSEN = chosen_chain(likeliest(Q), 2)


def _without_the_draft_token(p: Any, q: Any) -> Any:
    rest = p.copy()
    rest[int(q.argmax())] = 0.0
    return rest / rest.sum()


BROKEN_RULES: dict[str, tuple[str, Callable[..., Any], Draft]] = {
    "accepts if p >= q": ("accepts", lambda p, q, _u: p >= q, SAMPLED),
    "accepts everything": ("accepts", lambda _p, _q, _u: True, SAMPLED),
    "accepts nothing": ("accepts", lambda _p, _q, _u: False, SAMPLED),
    "accepts with p": ("accepts", lambda p, _q, u: u < p, SAMPLED),
    "accepts with the ratio upside down": ("accepts", lambda p, q, u: u * p < q, SAMPLED),
    "point mass accepted if likely": ("accepts", lambda p, _q, _u: p > 0.3, CHOSEN),
    "residual not subtracted": ("residual", lambda p, _q: p, SAMPLED),
    "residual not subtracted, point masses": ("residual", lambda p, _q: p, CHOSEN),
    "residual |p - q|": ("residual", lambda p, q: abs(p - q) / abs(p - q).sum(), SAMPLED),
    "residual q": ("residual", lambda _p, q: q, SAMPLED),
    "residual without the likeliest draft": ("residual", _without_the_draft_token, SAMPLED),
}


@pytest.mark.parametrize("name", BROKEN_RULES)
def test_broken_rules_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute, wrong, draft = BROKEN_RULES[name]
    assert error_of(RejectionRule(), P, draft, 3, length=2) < EXACT
    monkeypatch.setattr(rejection, attribute, wrong)
    assert error_of(RejectionRule(), P, draft, 3, length=2) > BROKEN


def _drop_unlikely(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
    """Sample, then cut the chain at the first token that q finds unlikely: the cut looks at what was drawn."""
    made = SAMPLED(context, noise, position)
    assert made.laws is not None
    likely = [law.probabilities(3)[token] > 0.3 for token, law in zip(made.tokens, made.laws, strict=True)]
    kept = likely.index(False) if False in likely else len(likely)
    return chain(made.tokens[:kept].tolist(), [0] * kept, made.laws[:kept]) if kept else NOTHING


def _best_of_two(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
    """Sample twice and keep the likelier token: a re-ranked sample passed off as a sample."""
    law = Q(context)
    first, second = (law.draw(noise.words(position + i, rejection.Stream.DRAFT, 3)) for i in (0, 1000))
    token = max(first, second, key=lambda t: law.probabilities(3)[t])
    return chain([token], [0], (law,))


def _chosen_as_sampled(context: Context, _noise: ScriptedNoise, _position: int) -> Proposal:
    """The likeliest token claimed to be a sample of q."""
    return chain([likeliest(Q)(context)], [0], (Q(context),))


def _renormalised_top_two(context: Context, _noise: ScriptedNoise, _position: int) -> Proposal:
    """A chosen top-k child verified with q = softmax over the top-k."""
    top = np.sort(np.argsort(-Q(context).probabilities(3))[:2])
    return chain([likeliest(Q)(context)], [0], (ScriptedLaw(Q(context).logits[top], top),))


def _other_temperature(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
    """Drawn at temperature 0.5 but carrying the law of temperature 1."""
    law = Q(context)
    token = ScriptedLaw(law.logits * 2).draw(noise.words(position, rejection.Stream.DRAFT, 3))
    return chain([token], [0], (law,))


@pytest.mark.parametrize(
    "draft", [_drop_unlikely, _best_of_two, _chosen_as_sampled, _renormalised_top_two, _other_temperature]
)
def test_false_claims_of_a_drafter_are_caught(draft: Draft) -> None:
    """What the rule cannot see in a tree, the checker sees in the law. Under `coupled` the same drafts are harmless."""
    assert error_of(RejectionRule(), P, draft, 3, length=2) > BROKEN
    assert error_of(CoupledRule(), P, draft, 3, length=2) < EXACT


def test_a_target_without_its_options_is_caught() -> None:
    """Verifying against the raw target when the request asked for top-k."""
    cut = random_laws(20, 3, SamplingParams(top_k=2))
    raw = committed_law(RejectionRule(), P, SAMPLED, 3, 2)
    assert np.abs(raw - committed_law(RejectionRule(), cut, SAMPLED, 3, 2)).max() > BROKEN
