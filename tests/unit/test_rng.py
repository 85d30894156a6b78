"""The noise: the same integers everywhere, uniforms strictly inside (0, 1), and independent uniform noise by its law.

The statistical tests use fixed seeds, so they either always pass or always fail; the odds stated beside them are those
of a correct generator failing for a freshly chosen seed.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from paceline.engine.rng import WORDS_PER_BLOCK, Noise, Stream, fresh_seed, philox_words_torch, uniforms

SEEDS = (0, 1, 12345, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
SAMPLES = (0, 1, 127)
POSITIONS = (0, 1, 77, 131_071, 2**31 + 5)
ROUNDS = (0, 1, 77)
COUNTS = (1, 2, 7, 8, 9, 31, 64, 1001)
FALSE_ALARM = 1e-6
"""Odds that one of the statistical assertions below fails although the generator is right."""


@pytest.mark.parametrize("seed", SEEDS)
def test_numpy_and_torch_give_the_same_integers(seed: int) -> None:
    for sample, position, stream in itertools.product(SAMPLES, POSITIONS, Stream):
        noise = Noise(seed, sample)
        for count in COUNTS:
            words = noise.words(position, stream, count)
            assert words.dtype == np.uint32
            assert words.shape == (count,)
            tensor = philox_words_torch(noise, position, stream, count)
            assert tensor.tolist() == words.tolist(), (seed, sample, position, stream, count)
        for round_id in ROUNDS:
            words = noise.words(position, stream, 9, round_id=round_id)
            assert philox_words_torch(noise, position, stream, 9, round_id=round_id).tolist() == words.tolist()


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as its paper writes it (Salmon et al., SC 2011), in plain integers."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_the_reference_gives_the_published_answer() -> None:
    """The known-answer vectors of the Random123 library."""
    zero = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    ones = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert philox4x64([0] * 4, [0] * 2) == zero
    assert philox4x64([2**64 - 1] * 4, [2**64 - 1] * 2) == ones


def test_words_are_philox_of_their_place() -> None:
    """Pins key and counter: a text with a seed must stay the same across releases and NumPy versions."""
    seed, sample, position = 2**63 + 11, 3, 42
    for round_id in ROUNDS:
        blocks = [philox4x64([block, position, Stream.RESIDUAL, round_id], [seed, sample]) for block in (1, 2)]
        halves = [half for word in itertools.chain(*blocks) for half in (word & 0xFFFFFFFF, word >> 32)]
        assert Noise(seed, sample).words(position, Stream.RESIDUAL, len(halves), round_id).tolist() == halves
    words = Noise(seed, sample).words(position, Stream.RESIDUAL, 3).tolist()
    assert words == [1113572324, 1206433539, 1263502610]


def test_fewer_words_are_a_prefix_of_more() -> None:
    noise = Noise(2**64 - 3, 5)
    longest = noise.words(1000, Stream.TARGET, 4 * WORDS_PER_BLOCK + 3)
    for count in range(1, len(longest) + 1):
        assert np.array_equal(noise.words(1000, Stream.TARGET, count), longest[:count])
    assert noise.uniform(1000, Stream.TARGET) == uniforms(longest)[0]


def test_every_part_of_the_place_matters() -> None:
    places = list(itertools.product(SEEDS, SAMPLES, POSITIONS, Stream, ROUNDS))
    seen = {tuple(Noise(seed, sample).words(position, stream, 8, r)) for seed, sample, position, stream, r in places}
    assert len(seen) == len(places)


def test_uniforms_at_both_ends_and_their_gumbel_noise() -> None:
    ends = uniforms(np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32))
    assert ends.tolist() == [(k + 0.5) / 2**32 for k in (0, 1, 2**31, 2**32 - 2, 2**32 - 1)]
    assert ends[0] > 0.0
    assert ends[-1] < 1.0
    gumbel = -np.log(-np.log(ends))
    assert np.isfinite(gumbel).all()
    assert (np.diff(gumbel) > 0).all()
    assert ends[0] + ends[-1] == 1.0  # symmetric, hence unbiased


def test_fresh_seeds_fit_a_signed_integer_and_differ() -> None:
    seeds = {fresh_seed() for _ in range(1000)}  # odds of a collision: 1000^2 / 2^64, below 1e-13
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def _samples_of(how: str, count: int) -> np.ndarray:
    """`count` uniforms that differ in one part of their place only.  # [count]"""
    if how == "token":
        return uniforms(Noise(7).words(3, Stream.TARGET, count))
    if how == "position":
        return np.array([Noise(7).uniform(position, Stream.TARGET) for position in range(count)])
    if how == "sample":
        return np.array([Noise(7, sample).uniform(3, Stream.TARGET) for sample in range(count)])
    return np.array([Noise(seed).uniform(3, Stream.TARGET) for seed in range(count)])


@pytest.mark.parametrize("how", ["token", "position", "sample", "seed"])
def test_the_law_is_uniform(how: str) -> None:
    """Along every axis of the key. A right generator fails with odds of 2e-6 (two tests at 1e-6) per axis."""
    count = 200_000 if how == "token" else 20_000
    values = _samples_of(how, count)
    assert stats.kstest(values, "uniform").pvalue > FALSE_ALARM
    cells = np.bincount((values * 256).astype(int), minlength=256)
    assert stats.chisquare(cells).pvalue > FALSE_ALARM


def test_low_bits_are_uniform() -> None:
    """Odds of a false alarm: 1e-6."""
    words = Noise(2**63 + 1).words(9, Stream.DRAFT, 100_000)
    assert stats.chisquare(np.bincount(words & 0xFF, minlength=256)).pvalue > FALSE_ALARM


def _neighbours() -> list[tuple[str, Noise, int, Stream, int]]:
    """Places that differ from (seed 7, sample 0, position 3, TARGET, round 0) in one part, by one or by one bit."""
    near: list[tuple[str, Noise, int, Stream, int]] = [
        (f"stream {stream.name}", Noise(7), 3, stream, 0) for stream in Stream if stream is not Stream.TARGET
    ]
    near += [(f"position {p}", Noise(7), p, Stream.TARGET, 0) for p in (2, 4, 7, 3 + 2**16)]
    near += [(f"sample {s}", Noise(7, s), 3, Stream.TARGET, 0) for s in (1, 2, 64)]
    near += [(f"seed {s}", Noise(s), 3, Stream.TARGET, 0) for s in (6, 8, 7 + 2**32, 7 + 2**63)]
    near += [(f"round {r}", Noise(7), 3, Stream.TARGET, r) for r in (1, 2, 2**16)]
    return near


@pytest.mark.parametrize(
    ("noise", "position", "stream", "round_id"), [pytest.param(*n[1:], id=n[0]) for n in _neighbours()]
)
def test_neighbouring_places_are_independent(noise: Noise, position: int, stream: Stream, round_id: int) -> None:
    """Correlation (also of shifted and of squared values) and a 16 x 16 contingency table.

    Under independence sqrt(n) * correlation is standard normal; seven correlations and one table at 1e-6 each make
    the odds of a false alarm 8e-6 per place.
    """
    n = 100_000
    here = uniforms(Noise(7).words(3, Stream.TARGET, n))
    there = uniforms(noise.words(position, stream, n, round_id))
    bound = stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(n)
    for lag in (-8, -4, -1, 0, 1, 8):
        assert abs(np.corrcoef(here, np.roll(there, lag))[0, 1]) < bound
    assert abs(np.corrcoef((here - 0.5) ** 2, (there - 0.5) ** 2)[0, 1]) < bound
    table, _, _ = np.histogram2d(here, there, bins=16, range=[[0, 1], [0, 1]])
    assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


def test_the_independence_check_catches_shared_noise() -> None:
    """A broken generator that ignores the stream would correlate perfectly."""
    words = uniforms(Noise(7).words(3, Stream.TARGET, 1000))
    assert np.corrcoef(words, words)[0, 1] > stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(1000)


@pytest.mark.gpu
def test_cuda_gives_the_same_integers(cuda: torch.device) -> None:
    for seed, position in itertools.product(SEEDS, POSITIONS):
        noise = Noise(seed, 3)
        tensor = philox_words_torch(noise, position, Stream.TARGET, 49_152, cuda)
        assert np.array_equal(tensor.cpu().numpy().astype(np.uint32), noise.words(position, Stream.TARGET, 49_152))
