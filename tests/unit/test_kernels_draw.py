"""The kernels' noise and draw: the same integers and the same tokens as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("triton")

from sampling_tools import DEVICE, SEEDS, drawn_by_cpu, hard_rows, host, law_of, places, temperatures

from paceline.config import SamplingParams
from paceline.engine.rng import Noise, Stream
from paceline.errors import PacelineError
from paceline.model.kernels.draw import draw_rows
from paceline.model.kernels.noise import philox_words
from paceline.model.kernels.rows import LogitRows

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_noise_is_the_same_integers(seed: int) -> None:
    for sample, position, stream, round_id in ((0, 0, 0, 0), (127, 2**31 + 5, 3, 77), (1, 131_071, 1, 1)):
        noise = Noise(seed, sample)
        for count in (1, 9, 1001):
            words = noise.words(position, Stream(stream), count, round_id=round_id)
            assert philox_words(noise, position, stream, count, DEVICE, round_id).tolist() == words.tolist()
    assert philox_words(Noise(seed), 5, 0, 2100, DEVICE).tolist() == Noise(seed).words(5, Stream.TARGET, 2100).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 1000, 2500])
def test_the_token_is_the_cpus(vocab: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(vocab)
    rows = hard_rows(vocab, rng, dtype)
    for temperature in (0.0, 1.0, 0.7, 3.0, 1e-6):
        params = SamplingParams(temperature=temperature)
        noises = [Noise(int(rng.choice(np.array(SEEDS, dtype=np.uint64))), int(rng.integers(3))) for _ in rows]
        positions = rng.integers(0, 100_000, len(rows)).tolist()
        drawn = draw_rows(LogitRows(rows.to(DEVICE)), places(noises, positions), temperatures([params] * len(rows)))
        want = [
            drawn_by_cpu(law_of(row, params), noise, position, vocab)
            for row, noise, position in zip(host(rows), noises, positions, strict=True)
        ]
        assert drawn.token.tolist() == want, temperature
        assert drawn.finite.all()


def test_a_large_vocabulary_and_rows_with_a_stride() -> None:
    vocab = 49_152
    wide = torch.randn(2, vocab + 40, generator=torch.Generator().manual_seed(1)).mul(3).bfloat16()
    rows = wide[:, 8 : 8 + vocab]
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=0.0)]
    noises, positions = [Noise(3), Noise(4)], [10, 11]
    drawn = draw_rows(LogitRows(wide.to(DEVICE)[:, 8 : 8 + vocab]), places(noises, positions), temperatures(params))
    laws = [law_of(row, p) for row, p in zip(host(rows), params, strict=True)]
    assert drawn.token.tolist() == [drawn_by_cpu(laws[i], noises[i], positions[i], vocab) for i in range(2)]


def test_rows_are_mixed_and_those_without_a_law_are_reported() -> None:
    rows = torch.randn(7, 1000, generator=torch.Generator().manual_seed(2)) * 2
    rows[1, 500] = float("nan")
    rows[2, 3] = float("inf")
    rows[3] = float("-inf")
    rows[4] = float("nan")
    rows[6, 7] = -float("nan")
    params = [SamplingParams(temperature=t) for t in (0.0, 1.0, 0.0, 1.0, 0.5, 0.5, 0.0)]
    noises, positions = [Noise(i) for i in range(7)], list(range(7))
    drawn = draw_rows(LogitRows(rows.to(DEVICE)), places(noises, positions), temperatures(params))
    assert drawn.finite.tolist() == [True, False, False, False, False, True, False]
    for i, finite in enumerate(drawn.finite.tolist()):
        if finite:
            assert drawn.token[i] == drawn_by_cpu(law_of(host(rows)[i], params[i]), noises[i], positions[i], 1000)
        else:
            assert drawn.token[i] == 0
            with pytest.raises(PacelineError):
                law_of(host(rows)[i], params[i])


def test_streams_differ() -> None:
    rows = torch.zeros(4, 64)
    noises, positions = [Noise(9)] * 4, [0, 1, 2, 3]
    for stream in Stream:
        drawn = draw_rows(
            LogitRows(rows.to(DEVICE)), places(noises, positions), torch.ones(4, device=DEVICE), stream=stream
        )
        law = law_of(host(rows)[0], SamplingParams())
        assert drawn.token.tolist() == [drawn_by_cpu(law, Noise(9), p, 64, stream) for p in positions]


def test_tokens_have_the_laws_frequencies() -> None:
    """Odds of a false alarm: 1e-6, for a seed chosen afresh."""
    count, vocab = (40 if DEVICE.type == "cpu" else 10_000), 5
    row = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.5])
    counts = np.zeros(vocab)
    for part in range(2):
        noises, positions = [Noise(part)] * count, list(range(count))
        rows = LogitRows(row.expand(count, vocab).contiguous().to(DEVICE))
        drawn = draw_rows(rows, places(noises, positions), torch.ones(count, device=DEVICE))
        counts += np.bincount(drawn.token.cpu().numpy(), minlength=vocab)
    expected = torch.softmax(row.double(), 0).numpy() * counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-6
