"""Logits to probabilities: the one definition that target and drafters share, and the draw from it.

Order: penalties and logit bias, the grammar's mask, the `min_tokens` mask, temperature, top-k, top-p (over what top-k
left), min-p. The vocabulary is never sorted: thresholds found in one pass leave a short list, and only that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.arrays import BoolArray
from paceline.config import SamplingParams
from paceline.engine.rng import uniforms
from paceline.errors import PacelineError, RequestError

_TOP_K_BLOCK = 64
_DEEPEST = -660.0
"""Tokens so far below the likeliest (e^-660) are taken to have no probability: beyond it fp64 loses bits."""
_FP32_REACH = 46.0
"""Logarithm of the latest finish at which fp32 weights still tell who may finish before."""
MIN_TEMPERATURE = 1e-30
"""Below it logits would overflow fp32, and the law is that of the likeliest token alone anyway."""


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """A distribution over tokens as unnormalised log-probabilities.

    `ids` lists the support in ascending order; None means the whole vocabulary, `logits[t]` being token t's.
    """

    logits: NDArray[np.floating]  # [num_support]
    ids: NDArray[np.int64] | None = None  # [num_support]

    @staticmethod
    def point(token: int) -> Law:
        """All mass on one token."""
        return Law(np.zeros(1, dtype=np.float32), np.array([token], dtype=np.int64))

    def probabilities(self, vocab_size: int) -> NDArray[np.float64]:
        """The normalised law.  # [vocab_size]"""
        weights = self.weights()
        weights /= weights.sum()
        if self.ids is None:
            return weights
        dense = np.zeros(vocab_size, dtype=np.float64)
        dense[self.ids] = weights
        return dense

    def weights(self) -> NDArray[np.float64]:
        """Unnormalised probabilities, the largest 1; what fp64 cannot hold to its last bit is 0.  # [num_support]"""
        below = self.logits.astype(np.float64)
        below -= float(self.logits.max())
        gone = below < _DEEPEST
        weights = np.maximum(below, _DEEPEST, out=below)
        # By PyTorch: the whole function takes half as long as with NumPy's exp (0.16 ms against 0.35, AVX2).
        torch.from_numpy(weights).exp_()
        weights[gone] = 0.0
        return weights

    def can_draw(self, token: int) -> bool:
        """Whether a token's weight is positive."""
        at = token
        if self.ids is not None:
            at = int(np.searchsorted(self.ids, token))
            if at == len(self.ids) or self.ids[at] != token:
                return False
        return at < len(self.logits) and float(self.logits[at]) - float(self.logits.max()) >= _DEEPEST

    def having(self, probabilities: NDArray[np.float64]) -> Law:
        """A law like this one, drawn from in the same way, with other probabilities.  # [vocab]"""
        with np.errstate(divide="ignore"):
            return replace(self, logits=np.log(probabilities), ids=None)

    def draw(self, words: NDArray[np.uint32]) -> int:
        """The Gumbel-max sample under per-token noise `words [vocab]`; ties go to the lowest id.

        Computed as an exponential race (argmin of E/w with E = -log u, w = exp(logit - max)), which has the same
        winner. The likeliest token's finishing time bounds the others, and E >= 1 - u, so one fp32 pass leaves a
        handful of tokens for the exact fp64 comparison.
        """
        best = int(self.logits.argmax())
        if len(self.logits) == 1:
            return best if self.ids is None else int(self.ids[0])
        noise = words[: len(self.logits)] if self.ids is None else words[self.ids]
        peak = float(self.logits[best])
        bound = -np.log(float(uniforms(noise[best : best + 1])[0]))
        reach = np.exp(self.logits - np.float32(peak))
        reach *= np.float32(bound * 1.0001)
        one_minus_u = np.invert(noise).astype(np.float32)
        one_minus_u += np.float32(0.5)
        one_minus_u *= np.float32(2.0**-32)
        rivals = np.flatnonzero(one_minus_u <= reach)
        times = -np.log(uniforms(noise[rivals])) / np.exp(self.logits[rivals].astype(np.float64) - peak)
        winner = int(rivals[times.argmin()])
        return winner if self.ids is None else int(self.ids[winner])

    def first(self, words: NDArray[np.uint32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The Gumbel-top-k sample: the first tokens to finish the race of `draw`, drawn without replacement.

        Args:
            words: noise per token id.  # [vocab]
            count: how many; fewer if the law holds no more.

        Returns:
            Tokens, and log-probability plus Gumbel noise of each, descending.  # [<= count] each
        """
        index = np.arange(len(self.logits)) if self.ids is None else self.ids
        noise = words[: len(self.logits)] if self.ids is None else words[self.ids]
        leaders = top_ids(self.logits, count)
        peak = float(self.logits[leaders[0]])
        weights = np.exp(self.logits - np.float32(peak))
        shift = float(np.log(weights.sum(dtype=np.float64)))
        bound = float(_log_times(noise[leaders], self.logits[leaders], peak).max())
        if bound < _FP32_REACH:
            one_minus_u = (np.invert(noise).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
            rivals = np.flatnonzero(one_minus_u <= weights * np.float32(np.exp(bound) * 1.0001))
        else:  # a leader is so unlikely that fp32 weights would lose its rivals
            rivals = np.flatnonzero(self.weights())
        times = _log_times(noise[rivals], self.logits[rivals], peak)
        order = np.argsort(times, kind="stable")[:count]
        return index[rivals[order]].astype(np.int64), -times[order] - shift


def _log_times(noise: NDArray[np.uint32], logits: NDArray[np.floating], peak: float) -> NDArray[np.float64]:
    """Logarithms of the times at which tokens finish the exponential race."""
    return np.asarray(np.log(-np.log(uniforms(noise))) - (logits.astype(np.float64) - peak), dtype=np.float64)


def build_law(
    row: NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Sequence[int] = (),
    allowed: BoolArray | None = None,
) -> Law:
    """The distribution of the next token.

    Args:
        row: raw logits.  # [vocab]
        params: the request's options.
        prompt: the prompt's tokens.
        output: the tokens generated before this position: committed ones and the node's own path.
        stop_ids: the tokens that would end the output, masked while `output` is shorter than `min_tokens`.
        allowed: the tokens a grammar allows here; None allows all.  # [vocab]

    Raises:
        PacelineError: the logits hold no finite value.
        RequestError: they hold none of a token that the grammar allows.
    """
    if params.edits_logits or allowed is not None:
        row = edit_logits(row, params, prompt, output, stop_ids, allowed)
    peak = float(row.max())
    if not np.isfinite(peak):
        raise PacelineError("the model returned logits without a finite maximum.")
    if params.greedy:
        return Law.point(int(row.argmax()))
    law = Law(row if params.temperature == 1.0 else row / np.float32(max(params.temperature, MIN_TEMPERATURE)))
    if 0 < params.top_k < len(row):
        law = _keep_top_k(law, params.top_k)
    if params.top_p < 1.0:
        law = _keep_top_p(law, params.top_p)
    if params.min_p > 0.0:
        threshold = law.logits.max() + np.float32(np.log(params.min_p))
        law = _subset(law, np.flatnonzero(law.logits >= threshold))
    return law


def edit_logits(
    row: NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Sequence[int],
    allowed: BoolArray | None = None,
) -> NDArray[np.float32]:
    """A copy of the row with penalties, bias, the grammar's and the `min_tokens` mask applied.  # [vocab]

    Raises:
        RequestError: no token that the grammar allows has a finite logit.
    """
    row = row.copy()
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray([*prompt, *output], dtype=np.int64))
        values = row[seen]
        factor = np.float32(params.repetition_penalty)
        row[seen] = np.where(values > 0, values / factor, values * factor)
    if output and (params.presence_penalty or params.frequency_penalty):
        seen, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        row[seen] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    for token, bias in params.logit_bias.items():
        row[token] += np.float32(bias)
    if allowed is None:
        if len(output) < params.min_tokens:
            row[list(stop_ids)] = -np.inf
        return row
    row = np.where(allowed, row, np.float32(-np.inf))
    if row.max() == -np.inf:
        raise RequestError("the grammar allows no token that the model could say here.", field="structured_outputs")
    if len(output) < params.min_tokens:
        longer = row.copy()
        longer[list(stop_ids)] = -np.inf
        if longer.max() > -np.inf:  # where only an end is allowed, the text ends, however short it is
            return longer
    return row


def token_logprobs(
    row: NDArray[np.float32], tokens: Sequence[int], top: int
) -> tuple[list[float], list[tuple[int, float]]]:
    """Log-probabilities under the raw logits: of `tokens`, and the `top` likeliest with their ids."""
    wide = row.astype(np.float64)
    peak = wide.max()
    log_total = peak + np.log(np.exp(wide - peak).sum())
    best = top_ids(row, top) if top else np.empty(0, dtype=np.int64)
    return (
        [float(wide[t] - log_total) for t in tokens],
        [(int(t), float(wide[t] - log_total)) for t in best],
    )


def top_ids(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The k largest entries, largest first, ties by lowest id.  # [k]

    The k-th largest maximum over blocks bounds the k-th largest entry from below, so few entries are sorted.
    """
    k = min(k, len(row))
    usable = len(row) // _TOP_K_BLOCK * _TOP_K_BLOCK
    candidates = np.arange(len(row))
    if usable // _TOP_K_BLOCK >= 2 * k:
        peaks = row[:usable].reshape(-1, _TOP_K_BLOCK).max(axis=1)
        bound = np.partition(peaks, len(peaks) - k)[len(peaks) - k]
        candidates = np.flatnonzero(row >= bound)
    order = np.argsort(-row[candidates], kind="stable")[:k]
    return candidates[order].astype(np.int64)


def _keep_top_k(law: Law, k: int) -> Law:
    return _subset(law, np.sort(top_ids(law.logits, k)))


def _keep_top_p(law: Law, top_p: float) -> Law:
    weights = np.exp(law.logits.astype(np.float64) - float(law.logits.max()))
    total = float(weights.sum())
    # Tokens below this weight sum to less than (1 - top_p) together, so none of them is needed to reach top_p.
    candidates = np.flatnonzero(weights >= (1.0 - top_p) * total / len(weights))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    needed = int(np.searchsorted(np.cumsum(weights[order]), top_p * total)) + 1
    return _subset(law, np.sort(order[:needed]))


def _subset(law: Law, index: NDArray[np.int64]) -> Law:
    return Law(law.logits[index], index if law.ids is None else law.ids[index])
