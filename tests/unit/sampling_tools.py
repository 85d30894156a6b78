"""What the tests of sampling kernels share: the device they run on, and rows that are hard to sample from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paceline.config import SamplingParams
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law, build_law
from paceline.model.kernels.draw import Places
from paceline.model.kernels.limits import Limits
from paceline.model.kernels.noise import as_int64

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels run: a CPU only under Triton's interpreter."""
SEEDS = (0, 1, 12345, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def hard_rows(vocab: int, rng: np.random.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Logits: peaked, flat, full of ties, of one value, mostly -inf, with both zeros, far apart.  # [8, vocab]"""
    rows = np.empty((8, vocab), dtype=np.float32)
    rows[0] = rng.normal(0, 4, vocab)
    rows[1] = rng.normal(0, 0.3, vocab)
    rows[2] = rng.integers(-2, 3, vocab)
    rows[3] = 1.5
    rows[4] = np.where(rng.random(vocab) < 0.7, -np.inf, rng.normal(0, 2, vocab))
    rows[4, rng.integers(vocab)] = 0.25
    rows[5] = rng.choice(np.array([0.0, -0.0, -1.0], dtype=np.float32), vocab)
    rows[6] = rng.normal(0, 40, vocab)
    rows[7] = -np.abs(rng.normal(0, 1, vocab)) - 1000
    return torch.from_numpy(rows).to(dtype)


def host(rows: torch.Tensor) -> np.ndarray:
    """What `TargetScores.host` makes of logits."""
    return rows.float().cpu().numpy()


def law_of(row: np.ndarray, params: SamplingParams) -> Law:
    """The CPU's law without history."""
    return build_law(row, params, [], [])


def drawn_by_cpu(law: Law, noise: Noise, position: int, vocab: int, stream: Stream = Stream.TARGET) -> int:
    """The token of `Law.draw`."""
    return law.draw(noise.words(position, stream, vocab))


def places(noises: Sequence[Noise], positions: Sequence[int]) -> Places:
    """Where rows read their noise, on the device."""

    def column(numbers: list[int]) -> torch.Tensor:
        return torch.tensor([as_int64(number) for number in numbers], dtype=torch.int64, device=DEVICE)

    return Places(column([n.seed for n in noises]), column([n.sample_index for n in noises]), column(list(positions)))


def temperatures(params: Sequence[SamplingParams]) -> torch.Tensor:
    """What kernels take as temperature: 0 is greedy."""
    numbers = [0.0 if p.greedy else max(p.temperature, 1e-30) for p in params]
    return torch.tensor(numbers, dtype=torch.float32, device=DEVICE)


def limits(params: Sequence[SamplingParams]) -> Limits:
    """What kernels take as top-k, top-p and min-p."""

    def column(numbers: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype, device=DEVICE)

    logs = [float(np.log(p.min_p)) if p.min_p > 0 else -float("inf") for p in params]
    return Limits(
        column([p.top_k for p in params], torch.int32),
        column([p.top_p for p in params], torch.float64),
        column(logs, torch.float64).float(),
    )
