"""Thresholds found without sorting: the tokens that top-k, top-p and min-p leave are the CPU's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from sampling_tools import DEVICE, drawn_by_cpu, hard_rows, host, law_of, limits, places, temperatures

from paceline.config import SamplingParams
from paceline.engine.rng import Noise
from paceline.model.kernels.draw import draw_rows
from paceline.model.kernels.limits import find_cut, kept_tokens
from paceline.model.kernels.peaks import find_peaks
from paceline.model.kernels.rows import LogitRows

OPTIONS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((1.0, 0.7), (0, 1, 3, 50), (1.0, 0.9, 0.3), (0.0, 0.1))
]


def check(logits: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """The support is the CPU's (where it can be drawn at all), and so is the token."""
    vocab = logits.shape[1]
    rows, heat = LogitRows(logits.to(DEVICE)), temperatures(params)
    peaks = find_peaks(rows, heat)
    cut = find_cut(rows, heat, limits(params), peaks)
    kept = kept_tokens(rows.raw.float(), heat, cut).cpu().numpy()
    noises = [Noise(17, i) for i in range(len(params))]
    drawn = draw_rows(rows, places(noises, [5] * len(params)), heat, cut, peaks).token.tolist()
    for i, row in enumerate(host(logits)):
        law = law_of(row, params[i])
        assert drawn[i] == drawn_by_cpu(law, noises[i], 5, vocab), params[i]
        want = np.zeros(vocab, dtype=np.bool_)
        want[slice(None) if law.ids is None else law.ids] = True
        if not params[i].greedy:
            possible = np.isfinite(row)
            assert np.array_equal(kept[i] & possible, want & possible), (i, params[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 1000])
def test_the_support_is_the_cpus(vocab: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(vocab)
    hard = hard_rows(vocab, rng, dtype)
    jobs = [(row, params) for row in hard for params in OPTIONS]
    chosen = rng.permutation(len(jobs))[: 20 if DEVICE.type == "cpu" else None]
    check(torch.stack([jobs[i][0] for i in chosen]), [jobs[i][1] for i in chosen])


def test_many_tiles() -> None:
    rng = np.random.default_rng(5)
    hard = hard_rows(5000, rng, torch.bfloat16)
    params = [SamplingParams(top_k=k, top_p=p) for k, p in ((40, 1.0), (0, 0.9), (700, 0.95), (0, 0.999))]
    check(torch.cat([hard[[0, 2, 3, 4]], hard[[1, 5, 6, 7]]]), params * 2)


def test_a_large_vocabulary() -> None:
    logits = torch.randn(3, 49_152, generator=torch.Generator().manual_seed(1)).mul(3).bfloat16()
    check(logits, [SamplingParams(top_p=0.9), SamplingParams(top_k=50), SamplingParams(temperature=0.0)])


def test_ties_at_the_threshold_go_to_the_lowest_ids() -> None:
    row = torch.zeros(1, 3000)
    row[0, [2900, 10, 77]] = 2.0
    for params in (
        SamplingParams(top_k=2),
        SamplingParams(top_k=5),
        SamplingParams(top_k=2999),
        SamplingParams(top_k=3000),
        SamplingParams(top_p=0.004),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=4, top_p=0.9),
        SamplingParams(top_k=4, top_p=0.99),
        SamplingParams(top_k=4, top_p=0.9999, min_p=0.5),
    ):
        check(row, [params])


def test_half_of_a_uniform_law_is_its_first_half() -> None:
    for vocab in (8, 1024):
        check(torch.full((1, vocab), 3.0), [SamplingParams(top_p=0.5)])


def test_temperature_merges_logits_before_top_k_counts() -> None:
    """Two fp32 logits that differ in the last bit are one number after the division: the lower id comes first."""
    high = np.nextafter(np.float32(2.0), np.float32(0.0))
    low = np.nextafter(high, np.float32(0.0))
    heat = next(t for t in np.linspace(1.1, 3, 400) if low / np.float32(t) == high / np.float32(t))
    row = torch.tensor([[0.0, float(low), float(high), -1.0]])
    for top_k in (1, 2, 3):
        check(row, [SamplingParams(temperature=float(heat), top_k=top_k)])


def test_rows_without_a_law_get_through() -> None:
    rows = torch.randn(4, 100, generator=torch.Generator().manual_seed(4))
    rows[0, 5] = float("nan")
    rows[1] = float("-inf")
    rows[2, 5] = float("inf")
    params = [SamplingParams(top_k=3, top_p=0.5, min_p=0.1)] * 4
    heat = temperatures(params)
    logits = LogitRows(rows.to(DEVICE))
    peaks = find_peaks(logits, heat)
    cut = find_cut(logits, heat, limits(params), peaks)
    drawn = draw_rows(logits, places([Noise(1)] * 4, [0] * 4), heat, cut, peaks)
    assert drawn.finite.tolist() == [False, False, False, True]
