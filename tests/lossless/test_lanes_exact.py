"""PEARL commits exactly the target's law, by full enumeration over several rounds; and on real code paths its text is
the engine's.

What runs is the schedule's own round on the clock, with the engine's rules. PEARL's indexing is easy to get wrong, so
deliberately wrong variants of it must be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from fakes import make_llm, make_loaded

from paceline import LLM, SamplingParams
from paceline.arrays import FloatArray
from paceline.bench.laws import Choices, LawOf, ScriptedNoise, outcomes, random_laws, target_law
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law
from paceline.lanes.clock import Clock
from paceline.lanes.models import Follower, ModelDraft, ModelTarget
from paceline.lanes.pearl import Pearl
from paceline.lanes.plain import plain, speculation
from paceline.lanes.threads import Threads
from paceline.lanes.tokens import Guess, Path, Text, Verdict, tokens_of
from paceline.lanes.work import Lanes, Process
from paceline.verify.base import AcceptanceRule
from paceline.verify.coupled import CoupledRule
from paceline.verify.rejection import RejectionRule

EXACT, BROKEN = 1e-12, 1e-3


class Scripted:
    """Target and draft of small laws, with scripted draws."""

    def __init__(self, p: LawOf, q: LawOf, noise: ScriptedNoise, *, carries: bool) -> None:
        self.p, self.q, self.noise, self.carries = p, q, noise, carries

    def laws(self, path: Path, tokens: Path) -> Sequence[Law]:
        whole = (*path, *tokens)
        return [self.p(whole[:end]) for end in range(len(path), len(whole) + 1)]

    def guess(self, path: Path, round_id: int) -> Guess:
        law = self.q(path)
        words = self.noise.words(len(path), Stream.DRAFT, 0, round_id=round_id)
        return Guess(law.draw(words), 1.0, law if self.carries else None)  # type: ignore[arg-type]


State = tuple[Path, Path]
"""What is committed, and what is pending."""


def law_of(schedule: Pearl, rule: AcceptanceRule, p: LawOf, q: LawOf, vocab: int, length: int) -> FloatArray:
    """Joint law of the first `length` tokens that a schedule writes, round by round.  # [vocab] * length"""
    carries = not rule.shares_noise

    @cache
    def one_round(path: Path, pending: Path) -> tuple[tuple[float, State], ...]:
        def run(choices: Choices) -> State:
            noise = ScriptedNoise(choices)
            models = Scripted(p, q, noise, carries=carries)
            text = Text(models, models, rule, noise, start=0, vocab_size=vocab, limit=99)  # type: ignore[arg-type]
            text.path = path
            before = [(*path, *pending[:i]) for i in range(len(pending))]
            known = [Guess(t, 1.0, q(c) if carries else None) for t, c in zip(pending, before, strict=True)]
            left: list[Path] = []

            def process(clock: Clock) -> Process:
                left.append(tokens_of((yield from schedule.round(clock, text, known))))

            clock = Clock({"draft": lambda n: 1.0 * n, "target": lambda _: 2.0})
            clock.spawn(process(clock))
            clock.run()
            return text.path, left[0]

        return tuple(outcomes(run))

    joint = np.zeros((vocab,) * length)

    def go(path: Path, pending: Path, weight: float) -> None:
        if len(path) >= length:
            joint[path[:length]] += weight
            return
        for probability, state in one_round(path, pending):
            go(*state, weight * probability)

    go((), (), 1.0)
    return joint


def error(schedule: Pearl, rule: AcceptanceRule, seed: int = 0, *, vocab: int = 2, length: int = 4) -> float:
    params = SamplingParams()
    p, q = random_laws(seed, vocab, params), random_laws(seed + 50, vocab, params)
    return float(np.abs(law_of(schedule, rule, p, q, vocab, length) - target_law(p, vocab, length)).max())


@pytest.mark.parametrize("rule", [RejectionRule(), CoupledRule()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("schedule", [Pearl(1), Pearl(2), Pearl(2, pre=False), Pearl(2, post=False)], ids=repr)
def test_pearl_is_exact(schedule: Pearl, rule: AcceptanceRule) -> None:
    for seed in range(2):
        assert error(schedule, rule, seed) < EXACT


def test_pearl_is_exact_on_three_tokens_and_on_longer_drafts() -> None:
    assert error(Pearl(2), RejectionRule(), 7, vocab=3, length=3) < EXACT
    assert error(Pearl(3), RejectionRule(), 8, vocab=2, length=4) < EXACT


class FirstOfTheNextRoundUntested(Pearl):
    """Post-verify tests what is pending only: the first new token slips through."""

    def settle(self, text: Text, pending, new, laws, now):  # type: ignore[no-untyped-def]
        if not pending:
            return super().settle(text, pending, new, laws, now)
        verdict = text.judge(pending, laws[: len(pending)])
        if verdict.token is None:  # it counts as tested
            text.commit([*pending, new[0]], Verdict(len(pending) + 1, None), now)
            return list(new[1:])
        text.commit(pending, verdict, now)
        return []


class DraftKeptAfterRejection(Pearl):
    """What was drafted behind a rejected token stays pending behind the recovered one."""

    def settle(self, text: Text, pending, new, laws, now):  # type: ignore[no-untyped-def]
        tested = [*pending, *new[:1]]
        verdict = text.judge(tested, laws)
        text.commit(tested, verdict, now)
        return list(new[1:])


class LawOfTheWrongPlace(Pearl):
    """Every token is tested against the law of the place before it."""

    def settle(self, text: Text, pending, new, laws, now):  # type: ignore[no-untyped-def]
        return super().settle(text, pending, new, [laws[0], *laws[:-1]], now)


class BonusBeforePending(Pearl):
    """After full acceptance a token is drawn from the last law, though the first new token was tested by it."""

    def settle(self, text: Text, pending, new, laws, now):  # type: ignore[no-untyped-def]
        left = super().settle(text, pending, new, laws, now)
        if left:
            text.commit([], Verdict(0, laws[-1].draw(text._noise._choices)), now)
        return []


@pytest.mark.parametrize(
    "broken", [FirstOfTheNextRoundUntested, DraftKeptAfterRejection, LawOfTheWrongPlace, BonusBeforePending]
)
def test_wrong_indexing_is_caught(broken: type[Pearl]) -> None:
    assert error(broken(2), RejectionRule()) > BROKEN


# The engine's text, on real forwards with rollback.

PROMPTS = ([5, 9, 11, 3], [7, 20, 20, 31, 8, 2, 60], [4] * 9)


@pytest.fixture(scope="module")
def target() -> Iterator[LLM]:
    llm = make_llm()
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def draft() -> Iterator[LLM]:
    """The same model, a little off: it agrees often."""
    loaded = make_loaded()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    llm = make_llm(loaded)
    yield llm
    llm.close()


def follower(llm: LLM) -> Follower:
    return Follower(llm.engine.runner, llm.engine.stages.scheduler.blocks)


def text_of(target: LLM, draft: LLM, prompt: list[int], params: SamplingParams) -> tuple[Text, list[Follower]]:
    followers = [follower(target), follower(draft)]
    noise = Noise(params.seed or 0)
    guesses = ModelDraft(followers[1], prompt, params, noise, coupled=True, vocab_size=target.engine.vocab_size)
    text = Text(
        ModelTarget(followers[0], prompt, params),
        guesses,
        CoupledRule(),
        noise,
        start=len(prompt),
        vocab_size=target.engine.vocab_size,
        limit=params.max_tokens,
    )
    return text, followers


SCHEDULES = {
    "plain": plain,
    "speculation": lambda lanes, text: speculation(lanes, text, 3),
    "pearl": lambda lanes, text: Pearl(3).run(lanes, text),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("on_threads", [False, True])
def test_the_text_is_the_engines(target: LLM, draft: LLM, name: str, temperature: float, on_threads: bool) -> None:
    params = SamplingParams(temperature=temperature, seed=11, max_tokens=24, ignore_eos=True, repetition_penalty=1.1)
    wanted = [tuple(g.token_ids) for g in target.generate([list(p) for p in PROMPTS], params)]
    accepted = 0
    for prompt, output in zip(PROMPTS, wanted, strict=True):
        text, followers = text_of(target, draft, prompt, params)
        _run(SCHEDULES[name], text, on_threads)  # type: ignore[arg-type]
        for each in followers:
            each.close()
        assert text.path == output
        accepted += sum(text.streaks)
    assert (accepted > 0) == (name != "plain"), "the draft agrees now and then"
    for llm in (target, draft):
        assert llm.engine.stages.scheduler.blocks.counts().used == 0


def _run(schedule, text: Text, on_threads: bool) -> None:  # type: ignore[no-untyped-def]
    if on_threads:
        with Threads(["draft"], ["target"]) as lanes:
            lanes.run(schedule(lanes, text))
        return
    clock = Clock({"draft": lambda n: 1.0 * n, "target": lambda _: 3.0}, jitter=0.5)
    clock.spawn(schedule(clock, text))
    clock.run()


class Dying:
    """A draft model whose thread fails in mid-flight."""

    def __init__(self, inner: ModelDraft, after: int) -> None:
        self._inner, self._left = inner, after

    def guess(self, path: Path, round_id: int) -> Guess | None:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the device is gone")
        return self._inner.guess(path, round_id)


@pytest.mark.parametrize("after", [0, 1, 8])
def test_a_thread_that_dies_loses_no_token(target: LLM, draft: LLM, after: int) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    (wanted,) = target.generate([list(PROMPTS[0])], params)
    text, followers = text_of(target, draft, PROMPTS[0], params)
    text._draft = Dying(text._draft, after)  # type: ignore[arg-type]
    with Threads(["draft"], ["target"]) as lanes:
        lanes.run(_pearl(lanes, text))
    for each in followers:
        each.close()
    assert text.path == tuple(wanted.token_ids)
    assert not text.has_draft
    assert draft.engine.stages.scheduler.blocks.counts().used == 0


def _pearl(lanes: Lanes, text: Text) -> Process:
    return Pearl(3).run(lanes, text)
