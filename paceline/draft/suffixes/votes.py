"""Votes on how a text goes on: every context in which its ending occurred before has a say, the longest first.

What a context leaves open goes to the next shorter one (the blending of PPM, Cleary & Witten 1984). How much it leaves
open is counted, by its length and how often it occurred.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from paceline.arrays import FloatArray
from paceline.draft.suffixes.memory import inner

_OWN_WEIGHT = 2.0
"""What an occurrence in the request's own text counts beside one elsewhere."""
_PRIOR, _PRIOR_WEIGHT, _MEMORY = 2.0, 8.0, 500.0
_SIZES = np.array([1, 2, 3, 5, 9, 17])
_BOUNDS = np.array([2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 40])


def new_openness() -> FloatArray:
    """How often a context was followed by something new, and how often by anything, by class.  # [2, num_classes]

    The share is 2 / (n + 2) at first for one that occurred n times; counted from then on, the old fading slowly.
    """
    first = np.tile(_PRIOR / (_SIZES + _PRIOR), len(_BOUNDS) + 1)
    return _PRIOR_WEIGHT * np.stack([first, np.ones(len(first))])


@inner
def rank(bounds: np.ndarray, value: float) -> int:
    """How many of the rising bounds are not above a value."""
    i = 0
    while i < len(bounds) and bounds[i] <= value:
        i += 1
    return i


@njit(nogil=True, error_model="numpy")
def context_class(length: int, size: int) -> int:
    """Class of a context of `length` tokens that occurred `size` times."""
    return rank(_BOUNDS, length) * len(_SIZES) + rank(_SIZES, size) - 1


@inner
def open_chance(openness: np.ndarray, of: int) -> float:
    """That something new follows a context of this class."""
    return openness[0, of] / openness[1, of]


@inner
def count(openness: np.ndarray, of: int, new: bool) -> None:
    """Something followed a context of this class."""
    if openness[1, of] >= _MEMORY:
        openness[1, of] *= 0.5
        openness[0, of] *= 0.5
    openness[1, of] += 1.0
    openness[0, of] += new


@inner
def vote(
    openness: np.ndarray,
    lengths: np.ndarray,
    own: np.ndarray,
    votes: np.ndarray,
    levels: np.ndarray,
    first: int,
    end: int,
    of: np.ndarray,
    at: int,
) -> int:
    """The chance that the text goes on as at each occurrence of its ending.

    A context of n occurrences that leaves the share e open gives (1 - e) / n of what longer contexts left to each of
    them, those of longer contexts included. What the shortest one leaves open is nobody's.

    Args:
        openness: what is known of contexts.
        lengths: tokens that agree at the occurrences, the longest first.
        own: whether they are in the request's own text.
        votes: the chances, which are written here.
        levels: number of the longest context that each belongs to, likewise.
        first: the first of the occurrences in these arrays.
        end: the one after the last.
        of: classes of the contexts, the longest first, are written here ...
        at: ... from here on.

    Returns:
        How many contexts there are.
    """
    num_levels, left, each = 0, 1.0, 0.0
    for i in range(first, end):
        levels[i] = num_levels
        if i + 1 == end or lengths[i + 1] < lengths[i]:
            of[at + num_levels] = context_class(lengths[i], i + 1 - first)
            chance = open_chance(openness, of[at + num_levels])
            each += left * (1.0 - chance) / (i + 1 - first)
            left *= chance
            num_levels += 1
    left, total = 1.0, 0.0
    for i in range(first, end):
        votes[i] = each * _OWN_WEIGHT if own[i] else each
        total += votes[i]
        if i + 1 == end or lengths[i + 1] < lengths[i]:
            chance = open_chance(openness, of[at + levels[i]])
            each -= left * (1.0 - chance) / (i + 1 - first)
            left *= chance
    scale = (1.0 - left) / total
    for i in range(first, end):
        votes[i] *= scale
    return num_levels
