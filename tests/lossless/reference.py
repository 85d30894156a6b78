"""Slow references: sampling options and the draw written straight from their definitions, in fp64 with full sorts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from paceline.config import SamplingParams
from paceline.engine.rng import uniforms

Floats = NDArray[np.float64]


def slow_logits(
    row: NDArray[Any], params: SamplingParams, prompt: Sequence[int], output: Sequence[int], stop_ids: Sequence[int]
) -> Floats:
    """Penalties, bias and the `min_tokens` mask, token by token."""
    logits = np.array(row, dtype=np.float64)
    for token in range(len(logits)):
        if token in prompt or token in output:
            scale = params.repetition_penalty
            logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
        count = list(output).count(token)
        logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        logits[token] += params.logit_bias.get(token, 0.0)
        if token in stop_ids and len(output) < params.min_tokens:
            logits[token] = -np.inf
    return logits


def slow_law(
    row: NDArray[Any],
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
) -> Floats:
    """Probabilities of the next token after every option.  # [vocab]"""
    logits = slow_logits(row, params, prompt, output, stop_ids)
    order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    if params.temperature == 0.0:
        return np.eye(len(logits))[order[0]]
    weights = np.exp((logits - logits.max()) / params.temperature)
    if params.top_k:
        weights[order[params.top_k :]] = 0.0
    if params.top_p < 1.0:
        total, reached = weights.sum(), 0.0
        for place, token in enumerate(order):
            reached += weights[token]
            if reached >= params.top_p * total:
                weights[order[place + 1 :]] = 0.0
                break
    weights[weights < params.min_p * weights.max()] = 0.0
    return weights / weights.sum()


def slow_draw(logits: NDArray[Any], words: NDArray[np.uint32]) -> int:
    """The Gumbel-max sample by its definition; ties to the lowest id."""
    return int((np.asarray(logits, dtype=np.float64) - np.log(-np.log(uniforms(words)))).argmax())


def model_rows(model: torch.nn.Module, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits after every token, by the plain `transformers` forward.  # [len(tokens), vocab]"""
    with torch.inference_mode():
        rows: NDArray[np.float32] = model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()
    return rows


def chi_square(counts: Floats, law: Floats) -> float:
    """p-value of observed counts against a law; cells that expect fewer than five are pooled.

    A count where the law has no mass at all gives 0.
    """
    counts, law = counts.ravel(), law.ravel()
    if counts[law == 0.0].any():
        return 0.0
    counts, law = counts[law > 0.0], law[law > 0.0]
    expected = law * counts.sum()
    order = np.argsort(expected)
    small = int(np.searchsorted(np.cumsum(expected[order]), 5.0)) + 1 if expected.min() < 5.0 else 0
    rare = order[: max(small, int((expected < 5.0).sum()))]
    kept = np.setdiff1d(np.arange(len(expected)), rare)
    observed = np.concatenate([counts[kept], [counts[rare].sum()] if len(rare) else []])
    wanted = np.concatenate([expected[kept], [expected[rare].sum()] if len(rare) else []])
    if len(wanted) == 1:
        return 1.0
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


OPTION_MIXES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "presence": {"presence_penalty": 1.2},
    "frequency": {"frequency_penalty": 0.9},
    "negative_frequency": {"frequency_penalty": -0.6},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": {0: 2.0, 3: -1.5, 5: -100.0}},
    "min_tokens": {"min_tokens": 3},
    "all": {
        "temperature": 0.8,
        "top_k": 6,
        "top_p": 0.95,
        "min_p": 0.02,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {1: 1.0},
        "min_tokens": 2,
    },
}


def option_mixes(**common: Any) -> Iterator[tuple[str, SamplingParams]]:
    """Every mix by name, with further options."""
    for name, options in OPTION_MIXES.items():
        yield name, SamplingParams(**{**common, **options})
