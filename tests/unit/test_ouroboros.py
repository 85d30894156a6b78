"""Staged drafting and Ouroboros: same text, fewer draft forwards; the pool; suffixes; what the target teaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_tools import greedy, llm, loaded, make_blocks, make_request, make_runner, prompt_of, reference, run

from paceline import SamplingParams
from paceline.draft.base import DraftContext
from paceline.draft.guessers.ngram import NgramCounts, NgramGuesser, katz
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.ouroboros import LENGTH, OuroborosDrafter
from paceline.draft.phrases import PhrasePool
from paceline.draft.shapes.registry import create_shape, parse_tree
from paceline.engine import builder
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request
from paceline.engine.types import Observation
from paceline.errors import SpeculationSpecError

PROMPTS = [prompt_of(n) for n in (3, 20, 33, 18)]
PHRASES = [tuple(range(10 * i, 10 * i + LENGTH)) for i in range(1, 9)]


def ouroboros(coupled: bool = True, tree: str = "chain", **options: Any) -> OuroborosDrafter:
    runner, blocks = make_runner("llama", 128, 8), make_blocks(128, 8)
    shape = create_shape(parse_tree(tree), Origin.CHOSEN if coupled else Origin.DISTINCT)
    return OuroborosDrafter(runner=runner, blocks=blocks, vocab_size=96, coupled=coupled, shape=shape, **options)


def serve(
    monkeypatch: pytest.MonkeyPatch, speculation: str, seed: int = 0, tokens: int = 24, turns: int = 2, **options: Any
) -> tuple[float, float, Any]:
    """Mean accepted length, draft forwards per token, and the drafter, of the last of some turns over four prompts,
    whose texts must be the reference. (Random models do not repeat themselves much, so it takes a second turn.)"""
    monkeypatch.setattr(builder, "load_model", lambda *_, **__: loaded("llama", seed))
    engine = llm(speculation, max_num_seqs=1, **options).engine
    (made,) = engine.stages.drafting.drafters.values()
    runner = (made.model if isinstance(made, ModelDrafter) else made.draft.model).runner
    for _ in range(turns):
        before = runner.num_forwards
        requests = [make_request(p, greedy(tokens)) for p in PROMPTS]
        run(engine, requests)
        assert [tuple(r.output_ids) for r in requests] == [reference(p, tokens) for p in PROMPTS]
    made.blocks.check()
    assert made.blocks.counts().used == 0
    total, forwards = len(PROMPTS) * tokens, sum(r.stats.target_forwards for r in requests)
    return total / forwards, (runner.num_forwards - before) / total, made


def test_katz_spreads_what_trigrams_leave() -> None:
    found = katz({5: 3, 6: 1}, {5: 10, 7: 2, 8: 2})
    assert found == pytest.approx({5: 2.5 / 4, 6: 0.5 / 4, 7: 0.25 * 1.5 / 4, 8: 0.25 * 1.5 / 4})
    assert katz({}, {7: 1}) == {7: 0.5}
    assert katz({}, {}) == {}


def test_counts_are_bounded_and_new_habits_win() -> None:
    counts = NgramCounts(max_contexts=10)
    for token in range(1000):
        counts.add((token, token + 1), token + 2)
    assert len(counts) == 20
    for _ in range(500):
        counts.add((1, 2), 3)
    for token in range(10, 20):
        counts.add((1, 2), token)
    assert len(counts.after((1, 2))) == 4
    for _ in range(70):
        counts.add((1, 2), 9)
    after = counts.after((1, 2))
    assert max(after, key=after.__getitem__) == 9


@pytest.mark.parametrize("tree", ["chain", "best-first:expand=1,width=3"])
def test_staged_saves_draft_forwards_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tree: str) -> None:
    """Random models repeat themselves, which an n-gram model learns; another model's draft is partly rejected."""
    length, forwards, _ = serve(monkeypatch, "draft:model=x,k=5", 1, tree=tree)
    staged, fewer, _ = serve(monkeypatch, "draft:model=x,k=5,guess=ngram", 1, tree=tree)
    assert staged == length
    assert fewer < 0.75 * forwards


def test_a_uniform_guesser_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    length, forwards, _ = serve(monkeypatch, "draft:model=x,k=5")
    rng = np.random.default_rng(0)
    monkeypatch.setattr(NgramGuesser, "guess", lambda *_: [rng.integers(3, 96, 6).tolist()])
    control, same, _ = serve(monkeypatch, "draft:model=x,k=5,guess=ngram")
    assert control == length
    assert same > 0.95 * forwards


def test_guesses_come_from_the_tenant_and_the_own_text() -> None:
    guesser = NgramGuesser()
    teacher = make_request([3, 4, 5], salt="a")
    for _ in range(3):
        guesser.learn(teacher, [6, 7, 8], [6, 7, 8, 9])
    guesser.forget(teacher)
    assert list(guesser.guess(make_request([1, 4, 5], salt="a"), [], 3, 3)) == [(6,), (6, 7), (6, 7, 8)]
    assert list(guesser.guess(make_request([1, 4, 5], salt="a"), [6], 6, 2)) == [(7,), (7, 8)]
    assert not list(guesser.guess(make_request([1, 4, 5], salt="b"), [], 3, 3))
    own = make_request([20, 21, 22, 20, 21, 22, 20, 21], salt="b")
    assert list(guesser.guess(own, [], 2, 3)) == [(22,), (22, 20)]
    assert not list(guesser.guess(make_request([22, 20, 21], salt="b"), [], 2, 3)), "one request's text is its own"
    guesser.forget(own)
    assert own not in guesser._texts


def test_the_pool_is_first_in_first_out() -> None:
    pool = PhrasePool(LENGTH)
    for phrase in PHRASES:
        pool.add(1, phrase)
    assert pool.newest(1, 3) == PHRASES[:4:-1]
    pool.add(1, PHRASES[0])
    pool.replace(1, PHRASES[7], PHRASES[1])
    assert pool.newest(1, 3) == [PHRASES[1], PHRASES[0], PHRASES[6]]
    for i in range(100):
        pool.add(1, (i,) * LENGTH)
    assert len(pool.newest(1, 99)) == len(pool) == 20
    for token in range(5000):
        pool.add(token, PHRASES[0])
    assert pool.newest(1, 1) == []
    assert pool.newest(4999, 1) == [PHRASES[0]]


def test_texts_become_phrases() -> None:
    pool = PhrasePool(LENGTH)
    pool.add_text(range(30, 45), 13)
    assert len(pool) == 2
    assert pool.newest(37, 9) == [tuple(range(38, 44))]
    pool.add_text([1, 2, 3], 0)
    assert len(pool) == 2


def test_suffixes_stand_behind_the_draft_as_a_trie(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ouroboros()
    monkeypatch.setattr(made.draft._guesser, "learn", lambda *_: None)
    request = make_request(PROMPTS[1])
    draft = reference(PROMPTS[1], 6)
    pool = made._pools.of(request)
    alike = (*PHRASES[0][:2], *PHRASES[1][:4])
    for phrase in (PHRASES[2], PHRASES[0], alike):
        pool.add(draft[-1], phrase)
    (proposal,) = made.propose([DraftContext(request, 12)])
    assert proposal.tokens.tolist() == [*draft, 10, 30, 11, 31, 20, 12]
    assert proposal.parents.tolist() == [-1, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 8]
    first = len(made.draft.prior)
    assert proposal.key[6:].tolist() == [first + depth for depth in (0, 0, 1, 1, 2, 2)]
    assert len(made.prior) == first + LENGTH
    (short,) = ouroboros(chain=True).propose([DraftContext(request, 12)])
    assert short.parents.tolist() == list(range(-1, len(short) - 1))


def test_nothing_is_chosen_behind_a_drawn_draft() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=40)
    for tree in ("chain", "branching:widths=2/1"):
        made = ouroboros(coupled=False, tree=tree)
        shape = create_shape(parse_tree(tree), Origin.DISTINCT)
        plain = ModelDrafter(make_runner("llama", 64, 8), make_blocks(64, 8), vocab_size=96, coupled=False, shape=shape)
        for turn in range(4):
            request = make_request(PROMPTS[turn], params)
            ((a,), (b,)) = (drafter.propose([DraftContext(request, 8)]) for drafter in (made, plain))
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.laws is not None
            assert len(a) == 8
    (at_zero,) = ouroboros(coupled=False).propose([DraftContext(make_request(PROMPTS[0]), 8)])
    assert at_zero.origin is Origin.CHOSEN


def _observed(request: Request, path: list[int], best: list[int], committed: int) -> Observation:
    """A verified chain, after which the target likes `best`."""
    rows = np.array([request.token_ids[-1], *path])
    tokens = tuple(best[:committed])
    request.token_ids += tokens
    return Observation(request, tokens, rows, np.array(best)[:, None], np.arange(-1, len(path)))


def test_runs_behind_a_rejection_become_phrases() -> None:
    made = ouroboros(suffixes=0)
    request = make_request(PROMPTS[0])
    (draft,) = made.propose([DraftContext(request, 10)])
    path = draft.tokens.tolist()
    best = [path[0], 90, *path[2:], 77]  # the second token is rejected, and then the target agrees to the end
    pool = made._pools.of(request)
    pool._phrases.clear()
    made.observe(_observed(request, path, best, 2))
    behind = [1, 2, 3, 4]  # rows behind the rejection with six tokens left
    said = [*path[2:], 77]
    expected = {(path[i], tuple(said[i - 1 : i - 1 + LENGTH])) for i in behind[1:]} | {(path[1], tuple(said[:LENGTH]))}
    found = {(key, phrase) for key, phrases in pool._phrases.items() for phrase in phrases}
    assert found == expected


def test_tried_suffixes_are_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ouroboros(suffixes=1)
    monkeypatch.setattr(made.draft._guesser, "learn", lambda *_: None)
    request = make_request(PROMPTS[1])
    draft = list(reference(PROMPTS[1], 6))
    pool = made._pools.of(request)
    pool.add(draft[-1], PHRASES[0])
    (proposal,) = made.propose([DraftContext(request, 12)])
    assert proposal.tokens.tolist() == [*draft, *PHRASES[0]]
    said = [81, 82, 83, 84, 85, 86]
    made.observe(_observed(request, proposal.tokens.tolist()[:-1], [*draft, *said], 7))
    assert pool.newest(draft[-1], 1) == [tuple(said)]
    assert PHRASES[0] not in pool.newest(draft[-1], 20)


def test_every_part_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phrases save draft forwards; suffixes lengthen what is accepted, at the same number of draft nodes."""
    length, forwards, made = serve(monkeypatch, "ouroboros:model=x,k=12", tokens=48)
    without, more, _ = serve(monkeypatch, "ouroboros:model=x,k=12,phrases=0", tokens=48)
    assert without == length
    assert forwards < 0.8 * more
    alone, _, _ = serve(monkeypatch, "ouroboros:model=x,k=6,suffixes=0", tokens=48)
    assert length > alone
    assert made.taps


def test_a_warm_pool_is_better_and_can_be_refused() -> None:
    def forwards(made: OuroborosDrafter, salt: str) -> int:
        before = made.draft.model.runner.num_forwards
        request = make_request(PROMPTS[2], salt=salt)
        for start in range(0, 36, 9):
            made.propose([DraftContext(request, 16)])
            request.token_ids[len(PROMPTS[2]) :] = reference(PROMPTS[2], start + 9)
        made.forget(request)
        return made.draft.model.runner.num_forwards - before

    made = ouroboros()
    cold, warm, other = forwards(made, "a"), forwards(made, "a"), forwards(made, "b")
    assert warm < cold == other
    fresh = ouroboros(reuse=0)
    assert forwards(fresh, "a") == forwards(fresh, "a") == cold
    assert not fresh._pools._own


@pytest.mark.parametrize("rule", ["coupled", "rejection", "recursive", "multi"])
def test_texts_are_the_references(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    for seed in (0, 1):
        serve(monkeypatch, "ouroboros:model=x,k=14", seed, turns=1, rule=rule)


@pytest.mark.parametrize(
    ("speculation", "message"),
    [
        ("ouroboros:k=4", "needs a model"),
        ("draft:k=4", "needs a model"),
        ("draft:model=x,guess=oracle", "can guess"),
        ("ouroboros:model=x,suffixes=-1", "fewer than no"),
    ],
)
def test_wrong_options_are_refused(monkeypatch: pytest.MonkeyPatch, speculation: str, message: str) -> None:
    monkeypatch.setattr(builder, "load_model", lambda *_, **__: loaded("llama"))
    with pytest.raises(SpeculationSpecError, match=message):
        llm(speculation)
