"""Speculative sampling (Chen et al. 2302.01318): a chain from a draft model, accepted by rejection sampling.

The draft is the target without a few of its layers; every claim here holds for any draft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from paceline.bench.laws import sampled_chain
from paceline.bench.systems.base import Row, above, at_least, at_most, exactly, suite
from paceline.bench.systems.context import Context, tokens_of
from paceline.bench.systems.measures import (
    NoResidual,
    WatchedRejection,
    count,
    greedy_identity,
    with_drafter,
    with_rule,
)
from paceline.bench.systems.real_laws import hardest, law_error, pairs_p_value, uniform_law
from paceline.config import SamplingParams
from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.engine.request import Request
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law
from paceline.engine.types import Observation, Tap
from paceline.llm import LLM
from paceline.verify.base import AcceptanceRule
from paceline.verify.coupled import CoupledRule
from paceline.verify.rejection import RejectionRule

LENGTH = 4
"""K of the paper's experiments."""
EXACT = 1e-6
_LOOP_TOP = 8
"""Top-k of the loop test: joint laws of 64 pairs are told apart with few runs."""
_LEVEL = 1e-3
"""A chi-square below it rejects; one run in a thousand does so by chance."""
_NEARLY_ONE = 1.0 - 1e-3
_SAMPLES = 128
_TOGETHER = 8
"""Runs at once: more would not all get a draft in their first step, and nothing of the rule would be seen."""


def draft_engine(context: Context, rule: str = "rejection", **options: object) -> LLM:
    """The engine with the draft model at a fixed length."""
    return context.llm(context.draft(f"k={LENGTH}"), rule=rule, tree="chain", **options)


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield greedy_identity(context, draft_engine(context))[0]


def _laws(context: Context) -> Iterator[Row]:
    """E1: the committed law by enumeration."""
    rules: dict[str, AcceptanceRule] = {"rejection": RejectionRule(), "coupled": CoupledRule()}
    for name, rule in rules.items():
        error, places = law_error(context, rule, lambda q: sampled_chain(q, 2))
        yield at_most(f"E1: law of {name}, largest error", error, EXACT, _about_laws(places))
    error, places = law_error(context, RejectionRule(), lambda _: sampled_chain(uniform_law(16), 2))
    yield at_most("E1: with a uniform draft", error, EXACT, _about_laws(places))
    error, places = law_error(context, NoResidual(), lambda q: sampled_chain(q, 2), most=5)
    yield above("E1 control: no residual is caught", error, 1e-3, f"{places} contexts, a rule broken on purpose")


def _about_laws(places: int) -> str:
    return f"{places} contexts of the real model, top 8, joint law of two tokens, every outcome"


def _loop(context: Context) -> Iterator[Row]:
    """E2: first two tokens of many runs against their exact joint law."""
    runs = context.few(768, 256)
    note = f"{runs} runs (the catalogue: 20,000), T=1, top-k {_LOOP_TOP}, two tokens where the draft agrees least"
    yield at_least("E2: p-value of the loop", _loop_p_value(context, RejectionRule(), runs), _LEVEL, note)
    broken = _loop_p_value(context, NoResidual(), 256)
    yield at_most("E2 control: no residual is caught", broken, _LEVEL, "256 runs under a rule broken on purpose")


def _loop_p_value(context: Context, rule: AcceptanceRule, runs: int) -> float:
    (prompt,) = hardest(context, 1)
    llm = with_rule(draft_engine(context, max_num_seqs=_TOGETHER), rule)
    try:
        pairs = _pairs(context, llm, prompt, runs)
    finally:
        with_rule(llm, RejectionRule())
    return pairs_p_value(context.llm(), prompt, pairs, _LOOP_TOP)


def _pairs(context: Context, llm: LLM, prompt: Sequence[int], runs: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for seed in range(-(-runs // _SAMPLES)):
        context.say(f"E2: {len(found)} of {runs} runs")
        params = SamplingParams(
            temperature=1.0,
            top_k=_LOOP_TOP,
            max_tokens=3,
            ignore_eos=True,
            n=min(_SAMPLES, runs - len(found)),
            seed=seed,
        )
        (generation,) = llm.generate([list(prompt)], params)
        found += [(o.token_ids[0], o.token_ids[1]) for o in generation.outputs]
    return found


def _perfect_draft(context: Context) -> Iterator[Row]:
    """The target as its own draft."""
    spec = f'draft:model="{context.loaded.path}",k={LENGTH}'
    rule = WatchedRejection()
    llm = with_rule(context.llm(spec, rule="rejection", tree="chain"), rule)
    tokens = (LENGTH + 1) * context.few(8, 3)
    params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, seed=1)
    found = count(llm, context.prompts(context.few(6, 2)), params, one_by_one=False)
    note = f"{len(rule.passed)} draft tokens; below 1 only by the rounding of batch shapes"
    yield at_least("draft = target: acceptance rate", float(np.mean(rule.passed)), _NEARLY_ONE, note)
    yield at_least(
        f"draft = target: accepted length (K + 1 = {LENGTH + 1})",
        found.mean_accepted_length,
        (LENGTH + 1) * _NEARLY_ONE,
        f"{found.tokens} tokens in {found.target_forwards} target forwards",
    )


class UniformDrafter:
    """Knows nothing: every token of the vocabulary alike."""

    name = "draft"
    taps: frozenset[Tap] = frozenset()
    cost_per_token = True
    blocks = None

    def __init__(self, vocab_size: int) -> None:
        self._law = Law(np.zeros(vocab_size, dtype=np.float32))
        self.prior = np.array([0.5])

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """A chain of the full budget."""
        return [self._propose(c.request, c.budget) if c.budget > 0 else NOTHING for c in contexts]

    def _propose(self, request: Request, budget: int) -> Proposal:
        noise, start, size = Noise(request.seed, request.sample_index), len(request.token_ids), len(self._law.logits)
        words = [noise.words(start + depth, Stream.DRAFT, size, round_id=start) for depth in range(budget)]
        return chain([self._law.draw(word) for word in words], [0] * budget, (self._law,) * budget)

    def observe(self, observation: Observation) -> None:
        """There is nothing to learn."""

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


def _uniform_draft(context: Context) -> Iterator[Row]:
    """A uniform draft: exact and useless."""
    llm = draft_engine(context, max_num_seqs=16)
    with_drafter(llm, UniformDrafter(llm.engine.vocab_size))
    prompts = context.prompts(context.few(6, 2))
    params = SamplingParams(temperature=1.0, max_tokens=context.few(32, 16), seed=2)
    found = count(llm, prompts, params, one_by_one=False)
    note = f"{found.accepted_tokens} of {found.draft_tokens} draft tokens accepted"
    yield at_most("uniform draft: accepted length", found.mean_accepted_length, 1.05, note)


def _acceptance(context: Context) -> Iterator[Row]:
    """The acceptance rate against the mean of sum min(p, q)."""
    rule = WatchedRejection()
    llm = with_rule(draft_engine(context), rule)
    try:
        prompts = context.prompts(context.few(20, 4))
        params = SamplingParams(temperature=1.0, max_tokens=context.few(96, 32), seed=3)
        count(llm, prompts, params, one_by_one=False)
    finally:
        with_rule(llm, RejectionRule())
    yield from acceptance_rows(rule)


def acceptance_rows(rule: WatchedRejection) -> Iterator[Row]:
    """Measured acceptance against its expectation, and the formula of independent trials beside the measured length."""
    passed, chance = np.array(rule.passed, dtype=np.float64), np.array(rule.chance)
    alpha = float(passed.mean())
    error = float(np.sqrt((chance * (1.0 - chance)).sum())) / len(chance)
    gap = abs(alpha - float(chance.mean()))
    note = (
        f"rate {alpha:.4f}, mean sum min(p, q) {chance.mean():.4f} over {len(chance)} tests; standard error {error:.4f}"
    )
    bound = max(0.01, 3.0 * error)
    reason = "" if bound == 0.01 else "; the catalogue's 0.01 is below three standard errors of so few tests"
    yield at_most("acceptance rate minus mean sum min(p, q)", gap, round(bound, 4), note + reason)
    rounds = np.array(rule.rounds)[np.array(rule.drafted) == LENGTH]
    measured = float(rounds.mean())
    formula = (1.0 - alpha ** (LENGTH + 1)) / (1.0 - alpha) if alpha < 1.0 else LENGTH + 1.0
    error = float(rounds.std()) / np.sqrt(len(rounds)) / measured
    note = f"formula {formula:.3f}, measured {measured:.3f} over {len(rounds)} rounds; 1 less two standard errors"
    bound = round(1.0 - 2.0 * error, 3)
    yield at_least("independent-trials length over the measured one", formula / measured, bound, note)


def _stop(context: Context) -> Iterator[Row]:
    """End tokens inside a draft end the text."""
    prompts = context.prompts(context.few(20, 4))
    tokens = context.few(64, 24)
    plain = context.greedy(prompts, tokens)
    stop = [output[len(output) // 2] for output in plain]
    llm = draft_engine(context)
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": tokens}
    made = llm.generate(prompts, [SamplingParams(stop_token_ids=(token,), **common) for token in stop])
    wanted = [output[: output.index(token) + 1] for output, token in zip(plain, stop, strict=True)]
    same = sum(a in (b, b[:-1]) for a, b in zip(tokens_of(made), wanted, strict=True))
    yield exactly(
        "a stop token inside a draft ends the text", same, len(prompts), "a token from the middle of each output"
    )


run = suite(_identity, _laws, _loop, _perfect_draft, _acceptance, _stop, _uniform_draft)
