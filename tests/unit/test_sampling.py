"""Sampling: options against slow sorted references, the draw against the Gumbel-max definition, and its law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lossless.reference import OPTION_MIXES, chi_square, option_mixes, slow_draw, slow_law
from numpy.typing import NDArray

from paceline.config import SamplingParams
from paceline.engine.race import race
from paceline.engine.rng import Noise, Stream, uniforms
from paceline.engine.sampling import Law, build_law, edit_logits, token_logprobs, top_ids
from paceline.errors import PacelineError

PROMPT = [1, 4, 4, 7]
OUTPUT = [4, 9, 9, 2]
STOP_IDS = (2, 11)
FALSE_ALARM = 1e-6
MIXES = [pytest.param(params, id=name) for name, params in option_mixes(max_tokens=99)]


def rows(count: int, vocab: int, spread: float, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, spread, (count, vocab)).astype(np.float32)


def words(seed: int, vocab: int) -> NDArray[np.uint32]:
    return Noise(seed).words(5, Stream.TARGET, vocab)


# The draw


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("vocab", [2, 3, 50, 5000])
def test_draw_is_the_gumbel_argmax(spread: float, vocab: int) -> None:
    for i, row in enumerate(rows(60, vocab, spread, seed=vocab)):
        assert Law(row).draw(words(i, vocab)) == slow_draw(row, words(i, vocab))


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 50, 1000, 49152])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 3.0, 8.0, 30.0])
def test_the_race_has_the_winner_of_the_draw(spread: float, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for i in range(20):
        logits = (spread * rng.standard_normal(vocab)).astype(np.float32)
        if i % 3 == 0:
            logits = np.round(logits)  # ties
        if i % 4 == 0:
            logits[rng.integers(0, vocab, vocab // 3)] = -np.inf
        noise, position = Noise(int(rng.integers(0, 2**63)), i), int(rng.integers(0, 10000))
        expected = Law(logits).draw(noise.words(position, Stream.TARGET, vocab))
        assert race(logits, noise, position, Stream.TARGET) == expected


def test_draw_never_takes_a_token_without_probability() -> None:
    for i, row in enumerate(rows(300, 40, 2.0, seed=1)):
        row[np.random.default_rng(i).permutation(40)[: i % 40]] = -np.inf
        drawn = Law(row).draw(words(i, 40))
        assert drawn == slow_draw(row, words(i, 40))
        assert np.isfinite(row[drawn])


def test_draw_with_the_noise_at_its_ends() -> None:
    """The likeliest token gets the worst noise there is, the others the best, and the other way round."""
    ends = np.array([0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    rng = np.random.default_rng(2)
    for _ in range(3000):
        row = rng.choice([0.0, -1e-6, -0.5, -20.0, -24.0, -30.0, -np.inf], size=6).astype(np.float32)
        row[rng.integers(6)] = 0.0
        noise = rng.choice(ends, size=6)
        scores = row.astype(np.float64) - np.log(-np.log((noise + 0.5) / 2**32))
        close = np.flatnonzero(scores >= scores.max() - 1e-12)  # the two formulas may round a tie apart
        assert Law(row).draw(noise) in close


def test_draw_decides_neighbouring_noise_exactly() -> None:
    """Equal logits: the larger word wins, however close; fp32 cannot tell these words apart."""
    for k in (0, 1, 1000, 2**24 + 1, 2**31, 2**32 - 2**10, 2**32 - 3):
        for tokens in ([k, k + 1, k], [k + 1, k, k], [k, k, k + 1]):
            noise = np.array(tokens, dtype=np.uint32)
            assert Law(np.full(3, 1.25, dtype=np.float32)).draw(noise) == noise.argmax()


def test_ties_go_to_the_lowest_id() -> None:
    same_noise = np.full(9, 12345, dtype=np.uint32)
    row = np.array([0, 1, 3, 3, 2, 3, -1, -np.inf, 3], dtype=np.float32)
    assert Law(row).draw(same_noise) == 2
    assert Law(row[[3, 5, 8]], np.array([3, 5, 8])).draw(same_noise) == 3
    greedy = SamplingParams(temperature=0.0)
    assert build_law(row, greedy, [], []).draw(same_noise) == 2
    assert build_law(row, SamplingParams(temperature=0.0, logit_bias={2: -1.0}), [], []).draw(same_noise) == 3
    assert build_law(np.zeros(9, dtype=np.float32), greedy, [], []).ids == np.array([0])


def test_one_token_support() -> None:
    for ids in (np.array([6]), None):
        law = Law(np.array([-7.0], dtype=np.float32), ids)
        assert law.draw(words(1, 9)) == (6 if ids is not None else 0)
    assert Law.point(3).probabilities(5).tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("params", MIXES)
def test_a_draw_from_a_cut_law_uses_each_tokens_own_noise(params: SamplingParams) -> None:
    """The support list changes nothing: the draw equals the dense draw over the same probabilities."""
    for i, row in enumerate(rows(100, 12, 2.0, seed=3)):
        law = build_law(row, params, PROMPT, OUTPUT, STOP_IDS)
        with np.errstate(divide="ignore"):
            dense = np.log(law.probabilities(12))
        assert law.draw(words(i, 12)) == slow_draw(dense, words(i, 12))


@pytest.mark.parametrize("params", MIXES)
def test_the_law_of_the_draw(params: SamplingParams) -> None:
    """20,000 seeds against the reference's probabilities. Odds of a false alarm: 1e-6 per mix."""
    row, output = rows(1, 12, 1.5, seed=4)[0], OUTPUT[:2]
    law = build_law(row, params, PROMPT, output, STOP_IDS)
    drawn = [law.draw(words(seed, 12)) for seed in range(20_000)]
    counts = np.bincount(drawn, minlength=12).astype(np.float64)
    assert chi_square(counts, slow_law(row, params, PROMPT, output, STOP_IDS)) > FALSE_ALARM


def test_the_chi_square_catches_a_wrong_law() -> None:
    """Draws at temperature 1 are not those of temperature 0.95, and not those without a rare token."""
    row = rows(1, 12, 1.5, seed=4)[0]
    counts = np.bincount([Law(row).draw(words(seed, 12)) for seed in range(20_000)], minlength=12).astype(np.float64)
    assert chi_square(counts, slow_law(row, SamplingParams(temperature=0.95))) < FALSE_ALARM
    assert chi_square(counts, slow_law(row, SamplingParams(min_p=0.02))) < FALSE_ALARM


# The options


@pytest.mark.parametrize("params", MIXES)
@pytest.mark.parametrize("output", [[], [5], OUTPUT], ids=len)
def test_probabilities_equal_the_reference(params: SamplingParams, output: list[int]) -> None:
    for row in rows(50, 12, 3.0, seed=5):
        fast = build_law(row, params, PROMPT, output, STOP_IDS).probabilities(12)
        np.testing.assert_allclose(fast, slow_law(row, params, PROMPT, output, STOP_IDS), rtol=3e-5, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        *({"top_k": k} for k in (1, 2, 5, 29, 500, 999, 1000, 5000)),
        *({"top_p": p} for p in (1e-9, 0.3, 0.5, 0.9, 0.999, 1.0 - 1e-12)),
        *({"min_p": p} for p in (1e-6, 0.05, 0.5, 1.0)),
        {"top_k": 40, "top_p": 0.7, "min_p": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("levels", [0, 1, 3, 64], ids=lambda n: f"{n}-levels")
def test_cuts_keep_the_same_tokens_as_a_full_sort(options: dict[str, Any], levels: int) -> None:
    """On 1,000 tokens, with few distinct logits so that ties fall across every cut (0: all distinct)."""
    rng = np.random.default_rng(6)
    for _ in range(3):
        row = rng.normal(0, 2, 1000) if levels == 0 else rng.integers(0, levels, 1000) * 0.5
        row = row.astype(np.float32)
        fast = build_law(row, SamplingParams(**options), [], []).probabilities(1000)
        slow = slow_law(row, SamplingParams(**options))
        assert np.array_equal(fast > 0, slow > 0)
        np.testing.assert_allclose(fast, slow, rtol=1e-5)


def test_top_ids_against_a_stable_sort() -> None:
    rng = np.random.default_rng(7)
    for vocab in (1, 5, 64, 1000, 49_152, 49_160):
        for levels in (1, 4, 10**6):
            row = rng.integers(0, levels, vocab).astype(np.float32)
            for k in (1, 8, 100):
                assert top_ids(row, k).tolist() == np.argsort(-row, kind="stable")[:k].tolist()


def test_penalties_bias_and_mask_by_their_formulas() -> None:
    row = np.array([1.0, -1.0, 2.0, -2.0, 0.5], dtype=np.float32)
    original = row.copy()

    def edited(output: list[int], stop_ids: tuple[int, ...] = (), **options: Any) -> list[float]:
        return edit_logits(row, SamplingParams(**options), [0, 1], output, stop_ids).tolist()

    assert edited([2, 3, 3], repetition_penalty=2.0) == [0.5, -2.0, 1.0, -4.0, 0.5]
    assert edited([2, 3, 3], presence_penalty=0.5) == [1.0, -1.0, 1.5, -2.5, 0.5]
    assert edited([2, 3, 3], frequency_penalty=0.5) == [1.0, -1.0, 1.5, -3.0, 0.5]
    assert edited([2, 3, 3], frequency_penalty=-0.5, presence_penalty=1.0) == [1.0, -1.0, 1.5, -2.0, 0.5]
    assert edited([], logit_bias={4: 3.0, 0: -100.0}) == [-99.0, -1.0, 2.0, -2.0, 3.5]
    assert edited([4], (2, 3), min_tokens=2) == [1.0, -1.0, -np.inf, -np.inf, 0.5]
    assert edited([4, 4], (2, 3), min_tokens=2) == original.tolist()
    assert np.array_equal(row, original), "the model's row was changed in place"


def test_penalties_see_repeated_tokens_once() -> None:
    """A token in prompt and output, many times: the repetition penalty applies once, as in CTRL."""
    row = np.array([4.0, 4.0], dtype=np.float32)
    params = SamplingParams(repetition_penalty=2.0)
    assert edit_logits(row, params, [0, 0, 0], [0, 0], ()).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20, 1e-6, 100.0])
def test_extreme_temperatures(temperature: float) -> None:
    """Next to zero is greedy, up to ties, which stay fair."""
    row = np.array([30.0, 31.0, -80.0, 31.0], dtype=np.float32)
    params = SamplingParams(temperature=temperature)
    law = build_law(row, params, [], [])
    wanted = [0, 0.5, 0, 0.5] if temperature < 1.0 else slow_law(row, params)
    np.testing.assert_allclose(law.probabilities(4), wanted, atol=1e-6)
    noise = np.array([9, 7, 9, 8], dtype=np.uint32)
    assert law.draw(noise) == (3 if temperature < 1.0 else slow_draw(row / temperature, noise))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("mix", OPTION_MIXES)
def test_rows_without_a_finite_peak_are_refused(bad: float, mix: str) -> None:
    row = np.array([0.0, 1.0, bad, *[0.5] * 9], dtype=np.float32)
    for temperature in (0.0, 1.0):
        params = SamplingParams(**{**OPTION_MIXES[mix], "temperature": temperature})
        with pytest.raises(PacelineError, match="finite"):
            build_law(row, params, PROMPT, OUTPUT, STOP_IDS)


def test_a_row_without_any_token_is_refused() -> None:
    with pytest.raises(PacelineError, match="finite"):
        build_law(np.full(4, -np.inf, dtype=np.float32), SamplingParams(), [], [])
    with pytest.raises(PacelineError, match="finite"):
        build_law(np.zeros(2, dtype=np.float32), SamplingParams(min_tokens=1), [], [], (0, 1))


# Log-probabilities


def test_token_logprobs_equal_log_softmax() -> None:
    for row in rows(20, 700, 5.0, seed=8):
        wanted = torch.log_softmax(torch.from_numpy(row).double(), dim=-1)
        values, best = token_logprobs(row, [0, 699, 3], 5)
        np.testing.assert_allclose(values, wanted[[0, 699, 3]].numpy(), rtol=1e-12)
        top = wanted.topk(5)
        assert [token for token, _ in best] == top.indices.tolist()
        np.testing.assert_allclose([value for _, value in best], top.values.numpy(), rtol=1e-12)
    assert token_logprobs(rows(1, 9, 1.0, seed=9)[0], [], 0) == ([], [])


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.03, 0.005])
def test_the_first_tokens_of_the_race_at_any_temperature(temperature: float) -> None:
    """Against the obvious sort of log-probability plus Gumbel noise: also far down a peaked law, where fp32 ends."""
    for seed in range(20):
        logits = (np.random.default_rng(seed).normal(0, 4, 200) / temperature).astype(np.float32)
        words = Noise(seed).words(3, Stream.DRAFT, 200)
        law = Law(logits)
        p = law.probabilities(200)
        scores = np.full(200, -np.inf)
        scores[p > 0] = np.log(p[p > 0]) - np.log(-np.log(uniforms(words[p > 0])))
        expected = np.argsort(-scores, kind="stable")[: min(6, int((p > 0).sum()))]
        tokens, found = law.first(words, 6)
        assert tokens.tolist() == expected.tolist()
        np.testing.assert_allclose(found, scores[expected], rtol=1e-5, atol=1e-4)
