"""Votes on how a text goes on: every context in which its ending occurred before has a say, the longest first.

What a context leaves open goes to the next shorter one (the blending of PPM, Cleary & Witten 1984). How much it leaves
open is counted, by its length and how often it occurred.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paceline.draft.suffix_index import Occurrence

_OWN_WEIGHT = 2.0
"""What an occurrence in the request's own text counts beside one elsewhere."""


class Level(NamedTuple):
    """A context: its class and the tokens that followed it."""

    of: int
    following: Container[int]


@dataclass(frozen=True, slots=True)
class Matches:
    """Occurrences of an ending, the longest first, as columns; a group of them is a list of indices."""

    depth: int
    """Draft tokens that the ending holds."""
    levels: list[Level]
    """The contexts it was found by, the longest first."""
    lengths: list[int]
    texts: list[list[int]]
    at: list[int]
    own: list[bool]
    votes: list[float]
    """Chance that the text goes on as at this occurrence."""

    def following(self, group: list[int], depth: int) -> dict[int, list[int]]:
        """The group by the token that comes after `depth` draft tokens."""
        depth -= self.depth
        if len(group) == 1:  # most groups
            text, at = self.texts[group[0]], self.at[group[0]] + depth
            return {text[at]: group} if at < len(text) else {}
        by_token: dict[int, list[int]] = {}
        for i in group:
            text, at = self.texts[i], self.at[i] + depth
            if at < len(text):
                by_token.setdefault(text[at], []).append(i)
        return by_token

    def sorted_out(self, group: list[int]) -> tuple[int, bool]:
        """Longest match of a group when it was looked up, and whether one is in the request's own text."""
        return self.lengths[group[0]], any(map(self.own.__getitem__, group))


class Openness:
    """How often a context is followed by something that never followed it before, by its length and frequency.

    At first 2 / (n + 2) for one that occurred n times; counted from then on, the old fading slowly.
    """

    _PRIOR, _PRIOR_WEIGHT, _MEMORY = 2.0, 8.0, 500.0
    _SIZES = (1, 2, 3, 5, 9, 17)
    _BOUNDS = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 40)

    def __init__(self) -> None:
        sizes = len(self._SIZES)
        first = [self._PRIOR / (size + self._PRIOR) for size in self._SIZES]
        self._open = [self._PRIOR_WEIGHT * chance for chance in first] * (len(self._BOUNDS) + 1)
        self._seen = [self._PRIOR_WEIGHT] * (sizes * (len(self._BOUNDS) + 1))

    def of(self, length: int, size: int) -> int:
        """Class of a context of `length` tokens that occurred `size` times."""
        return bisect_right(self._BOUNDS, length) * len(self._SIZES) + bisect_right(self._SIZES, size) - 1

    def chance(self, of: int) -> float:
        """That something new follows a context of this class."""
        return self._open[of] / self._seen[of]

    def learn(self, of: int, new: bool) -> None:
        """Something followed a context of this class."""
        if self._seen[of] >= self._MEMORY:
            self._seen[of] *= 0.5
            self._open[of] *= 0.5
        self._seen[of] += 1.0
        self._open[of] += new


def vote(found: Sequence[tuple[Occurrence, bool]], depth: int, openness: Openness) -> Matches:
    """The occurrences of an ending with their votes.

    A context of n occurrences that leaves the share e open gives (1 - e) / n of what longer contexts left to each of
    them, those of longer contexts included. What the shortest one leaves open is nobody's.
    """
    levels: list[Level] = []
    shares: list[tuple[int, float]] = []  # occurrences of a context, what each of them gets
    left, following = 1.0, set[int]()
    for i, ((length, text, at), _) in enumerate(found, start=1):
        following.add(text[at])
        if i == len(found) or found[i][0][0] < length:
            of = openness.of(length, i)
            chance = openness.chance(of)
            levels.append(Level(of, frozenset(following)))
            shares.append((i, left * (1.0 - chance) / i))
            left *= chance
    each = sum([share for _, share in shares])
    votes: list[float] = []
    for size, share in shares:
        votes += [each * _OWN_WEIGHT if own else each for _, own in found[len(votes) : size]]
        each -= share
    scale = (1.0 - left) / sum(votes)
    occurrences, own = zip(*found, strict=True)
    lengths, texts, places = zip(*occurrences, strict=True)
    votes = [scale * value for value in votes]
    return Matches(depth, levels, list(lengths), list(texts), list(places), list(own), votes)
