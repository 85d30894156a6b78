"""Prompt lookup (LLMA 2304.04487; Saxena 2023): continue as the text did after the last occurrence of its ending.

Confidence class: how long the match is (looked up by a few tokens, then followed back), grown by one per drafted token
since an accepted token makes it longer; and whether the occurrence before the last one had gone on in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap
from paceline.errors import SpeculationSpecError

LENGTH_CLASSES = 16
_LONGEST_MATCH = 40
_FIRST_NODE = np.linspace(0.3, 0.9, LENGTH_CLASSES)


@dataclass(frozen=True, slots=True)
class Match:
    """`at`: index after the last earlier occurrence; `length`: tokens that agree, 0 without a match; `precedent`: 0
    without a still earlier occurrence, 1 if that went on in the same way, 2 if it did not."""

    at: int = -1
    length: int = 0
    precedent: int = 0


NO_MATCH = Match()


class NgramIndex:
    """Where every n-gram of a growing token list last ended, for n in `lengths`.

    Adding a token costs one dictionary write per length; looking up costs one read per length.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._last: dict[tuple[int, ...], tuple[int, int]] = {}  # n-gram -> (index after it, precedent)
        self.tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. An n-gram is indexed only once another token follows it."""
        for token in tokens:
            end = len(self.tokens)
            if end:
                for n in self._lengths:
                    if n <= end:
                        ngram = tuple(self.tokens[end - n : end])
                        before = self._last.get(ngram)
                        precedent = 0 if before is None else 1 if self.tokens[before[0]] == token else 2
                        self._last[ngram] = end, precedent
            self.tokens.append(token)

    def find(self, ending: Sequence[int]) -> Match:
        """The last earlier occurrence of the longest indexed end of `ending`."""
        for n in self._lengths:
            if n <= len(ending):
                found = self._last.get(tuple(ending[len(ending) - n :]))
                if found is not None:
                    return Match(found[0], n, found[1])
        return NO_MATCH


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
        self.prior = np.concatenate([_FIRST_NODE, 0.5 + 0.5 * _FIRST_NODE, 0.7 * _FIRST_NODE])

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """One chain per request that finds its ending again."""
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> Proposal:
        index = self._indexes.setdefault(context.request, NgramIndex(*self._bounds))
        tokens = context.request.token_ids
        index.extend(tokens[len(index.tokens) :])
        match = index.find(tokens[-self._bounds[1] :])
        if not match.length or context.budget < 1:
            return NOTHING
        drafted = tokens[match.at : match.at + context.budget]
        first = LENGTH_CLASSES * match.precedent
        length = follow_back(tokens, match)
        return chain(drafted, [first + length_class(length + depth) for depth in range(len(drafted))])

    def observe(self, observation: Observation) -> None:
        """Nothing to learn: the committed tokens are read at the next proposal."""

    def forget(self, request: Request) -> None:
        """Drop the request's index."""
        self._indexes.pop(request, None)


def follow_back(tokens: Sequence[int], match: Match) -> int:
    """How many tokens before `match.at` agree with the end of `tokens`."""
    length, end = match.length, len(tokens)
    longest = min(match.at, _LONGEST_MATCH)
    while length < longest and tokens[match.at - length - 1] == tokens[end - length - 1]:
        length += 1
    return length


def length_class(length: int) -> int:
    """Class of a match of this many tokens: exact up to 10, then in growing intervals.  # 0 .. LENGTH_CLASSES - 1"""
    if length <= 10:
        return length
    return min(11 + (length > 13) + (length > 17) + (length > 24) + (length > 33), LENGTH_CLASSES - 1)
