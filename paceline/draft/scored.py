"""What a draft model says after one node, as a tree shape sees it: ranked tokens, draws, and how sure it is.

Which noise ranks the tokens depends on the rule and on the shape:

- under `coupled`, the target's own noise of that position: the first token is the one the target would draw if both
  laws agreed, the second the next most likely to be it, and so on;
- under the other rules, for tokens that are drawn, noise of this very node in this very round;
- at temperature 0, and for tokens that are chosen, none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from paceline.arrays import FloatArray
from paceline.engine.request import Request
from paceline.engine.rng import Stream
from paceline.engine.sampling import Law, top_ids

_MOST_NODES = 4096
_MOST_DRAWS = 64
_RIVALS = 8
"""Tokens among which the target's noise decides, when chances are judged under `coupled`."""


class Ranking(Enum):
    """What ranks the tokens of a law."""

    TARGET_NOISE = "target noise"
    OWN_NOISE = "own noise"
    PROBABILITY = "probability"


@dataclass(frozen=True, slots=True)
class Ranked:
    """Tokens in the order of their draws, and log-probability plus Gumbel noise of each (if there is noise)."""

    tokens: tuple[int, ...]
    scores: FloatArray  # [len(tokens)], descending


@dataclass(frozen=True, eq=False)
class Scored:
    """One node and the draft law after it.

    `law` has every sampling option applied, except that at temperature 0 it is that of temperature 1.
    """

    node: int
    """-1: the root."""
    depth: int
    """Of the node; the root has 0."""
    row: NDArray[np.float32]
    """The raw logits.  # [vocab]"""
    law: Law
    ranking: Ranking
    request: Request
    vocab_size: int

    def ranked(self, count: int, *, exhaust: bool = True) -> Ranked:
        """The first `count` different tokens.

        Args:
            count: how many; fewer where there are no more.
            exhaust: go on uniformly over the rest of the vocabulary when a law that draws has no token left (what
                the rule `recursive` expects of siblings).
        """
        if self.ranking is Ranking.PROBABILITY:
            return _likeliest(self.law, count)
        found = self._first if count <= _RIVALS else self._race(count)
        tokens, scores = found.tokens[:count], found.scores[:count]
        if exhaust and self.ranking is Ranking.OWN_NOISE and len(tokens) < min(count, self.vocab_size):
            rest = np.argsort(-self._words().astype(np.int64), kind="stable")
            more = [t for t in rest.tolist() if t not in tokens][: count - len(tokens)]
            return Ranked((*tokens, *more), np.append(scores, np.full(len(more), -np.inf)))
        return Ranked(tokens, scores)

    def independent(self, count: int) -> tuple[int, ...]:
        """`count` draws with replacement."""
        if self.ranking is not Ranking.OWN_NOISE:
            return self.ranked(count).tokens
        return tuple(self.law.draw(self._words(i)) for i in range(count))

    def chances(self, tokens: Sequence[int]) -> list[float]:
        """How likely each token is to be the one, as far as may be known before it is drawn.

        For a drawn token that is the largest probability of the law it was drawn from, whatever it is.
        """
        if not tokens:
            return []
        if self.ranking is Ranking.OWN_NOISE:
            return [self.confidence] * len(tokens)
        if self.ranking is Ranking.PROBABILITY:
            return [float(np.exp(self.row[t] - self._peak)) / self._total for t in tokens]
        rivals = self.ranked(max(_RIVALS, len(tokens)))
        weights = np.exp(rivals.scores - rivals.scores[0])
        place = {token: i for i, token in enumerate(rivals.tokens)}
        return (weights[[place[t] for t in tokens]] / weights.sum()).tolist()  # type: ignore[no-any-return]

    def log_probabilities(self, tokens: Sequence[int]) -> FloatArray:
        """Of tokens that the law can draw.  # [len(tokens)]"""
        law = self.law
        at = np.asarray(tokens) if law.ids is None else np.searchsorted(law.ids, tokens)
        logits = law.logits.astype(np.float64)
        peak = float(logits.max())
        return np.asarray(logits[at] - peak - np.log(np.exp(logits - peak).sum()))

    @cached_property
    def _first(self) -> Ranked:
        return self._race(_RIVALS)

    def _race(self, count: int) -> Ranked:
        tokens, scores = self.law.first(self._words(), count)
        return Ranked(tuple(tokens.tolist()), scores)

    @cached_property
    def _peak(self) -> np.float32:
        peak: np.float32 = self.row.max()
        return peak

    @cached_property
    def _weights(self) -> NDArray[np.float32]:
        weights: NDArray[np.float32] = np.exp(self.row - self._peak)
        return weights

    @cached_property
    def _total(self) -> float:
        return float(self._weights.sum())

    @property
    def confidence(self) -> float:
        """The largest raw probability."""
        return 1.0 / self._total

    @cached_property
    def entropy(self) -> float:
        """Of the raw distribution, in nats."""
        finite = np.where(self._weights > 0.0, self.row - self._peak, np.float32(0.0))
        return float(np.log(self._total) - (self._weights * finite).sum() / self._total)

    def top_probabilities(self, count: int) -> FloatArray:
        """The largest raw probabilities, descending; 0 beyond the vocabulary.  # [count]"""
        known = min(count, len(self._weights))
        best = np.sort(np.partition(self._weights, len(self._weights) - known)[-known:])[::-1]
        return np.pad(best.astype(np.float64) / self._total, (0, count - known))

    def _words(self, draw: int = 0) -> NDArray[np.uint32]:
        position = len(self.request.token_ids) + self.depth
        if self.ranking is Ranking.TARGET_NOISE:
            return self.request.noise.words(position, Stream.TARGET, self.vocab_size)
        place = (len(self.request.token_ids) * _MOST_NODES + self.node + 1) * _MOST_DRAWS + draw
        return self.request.secret_noise.words(position, Stream.DRAFT, self.vocab_size, round_id=place)


def _likeliest(law: Law, count: int) -> Ranked:
    best = top_ids(law.logits, count)
    best = best[law.logits[best] > -np.inf]
    peak = law.logits[best[0]]
    scores = (law.logits[best] - peak).astype(np.float64) - np.log(np.exp(law.logits - peak).sum(dtype=np.float64))
    tokens = best if law.ids is None else law.ids[best]
    return Ranked(tuple(tokens.tolist()), scores)
