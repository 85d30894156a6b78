"""Prompt lookup (LLMA 2304.04487; Saxena 2023): continue as the text did after the last occurrence of its ending.

Confidence class: the length of the match, grown by one per drafted token (an accepted token makes the match longer).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap
from paceline.errors import SpeculationSpecError

MAX_KEY = 15


class NgramIndex:
    """Where every n-gram of a growing token list last ended, for n in `lengths`.

    Adding a token costs one dictionary write per length; looking up costs one read per length.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._last: dict[tuple[int, ...], int] = {}
        self.tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. An n-gram is indexed only once another token follows it."""
        for token in tokens:
            end = len(self.tokens)
            if end:
                for n in self._lengths:
                    if n <= end:
                        self._last[tuple(self.tokens[end - n : end])] = end
            self.tokens.append(token)

    def find(self, ending: Sequence[int]) -> tuple[int, int]:
        """(index after the last earlier occurrence, match length) of the longest indexed end of `ending`."""
        for n in self._lengths:
            if n <= len(ending):
                at = self._last.get(tuple(ending[len(ending) - n :]))
                if at is not None:
                    return at, n
        return -1, 0


class NgramDrafter:
    """Prompt lookup over the request's own tokens.

    Args:
        lookup_max: longest ending that is looked up.
        lookup_min: shortest one.

    Raises:
        SpeculationSpecError: the bounds are impossible.
    """

    name = "ngram"
    taps: frozenset[Tap] = frozenset()
    cost_per_token = False
    blocks = None

    def __init__(self, *, lookup_max: int = 4, lookup_min: int = 2) -> None:
        if not 1 <= lookup_min <= lookup_max <= 32:
            raise SpeculationSpecError(
                f"lookup_min={lookup_min} and lookup_max={lookup_max} are impossible.",
                field="speculation",
                fix="Take 1 <= lookup_min <= lookup_max <= 32.",
            )
        self._bounds = (lookup_min, lookup_max)
        self._indexes: dict[Request, NgramIndex] = {}
        self.prior = np.linspace(0.3, 0.9, MAX_KEY + 1)

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """One chain per request that finds its ending again."""
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> Proposal:
        index = self._indexes.setdefault(context.request, NgramIndex(*self._bounds))
        tokens = context.request.token_ids
        index.extend(tokens[len(index.tokens) :])
        at, length = index.find(tokens[-self._bounds[1] :])
        return continuation(tokens, at, length, context.budget)

    def observe(self, observation: Observation) -> None:
        """Nothing to learn: the committed tokens are read at the next proposal."""

    def forget(self, request: Request) -> None:
        """Drop the request's index."""
        self._indexes.pop(request, None)


def continuation(tokens: Sequence[int], at: int, length: int, budget: int) -> Proposal:
    """The chain `tokens[at : at + budget]`, classed by match length."""
    drafted = tokens[at : at + budget] if length else ()
    if not drafted:
        return NOTHING
    return chain(drafted, [min(length + depth, MAX_KEY) for depth in range(len(drafted))])
