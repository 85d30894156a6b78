"""Occurrences of an ending in a suffix structure."""

from __future__ import annotations

import numpy as np

from paceline.compiled import compiled
from paceline.draft.suffixes.index import INDEX, INDEX_BITS, LENGTH, LONGEST, TEXT, record_of
from paceline.draft.suffixes.memory import inner
from paceline.draft.suffixes.nodes import CHILDREN, COUNT, LEAF, PARENT, ROOT, child_of, place_at


@compiled()
def find(
    m: np.ndarray,
    ending: np.ndarray,
    end: int,
    enough: int,
    without: int,
    found: np.ndarray,
    at: int,
) -> int:
    """Earlier occurrences of the last 1 to `longest` tokens of an ending, longest match first, then the latest.

    Of every context they are all there are, or the latest `recent` of them.

    Args:
        m: the structure.
        ending: the context, in its first `end` words.
        end: how many tokens it is.
        enough: look at no shorter context once so many are found.
        without: a sequence whose occurrences do not count.
        found: for how many tokens agree, before which word of `m` (it says what followed), and how many tokens stand
            there from it on.  # [3 or more, n]
        at: the first column of `found` to write.

    Returns:
        How many were found.
    """
    node, depth = m[ROOT], 0
    while depth < end and m[node + CHILDREN] != LEAF:
        child = child_of(m, node, ending[end - 1 - depth])
        if not child:
            break
        node, depth = child, depth + 1
    below, to = 0 * node, at  # (not `int`s, for which `_read` would be compiled once more)
    while True:
        leaf = m[node + CHILDREN] == LEAF
        if leaf or depth:
            to = _read(m, node, below, depth, ending, end, without, found, to)
        if to - at >= enough or node == m[ROOT]:
            return to - at
        below, node, depth = node, m[node + PARENT], depth - 1


@inner
def _read(
    m: np.ndarray,
    node: int,
    below: int,
    depth: int,
    ending: np.ndarray,
    end: int,
    without: int,
    found: np.ndarray,
    at: int,
) -> int:
    """Add the places of a context to those found; where they end. Of its child `below`, all were found before."""
    unknown = m[below + COUNT] if below else 0
    i, first = m[node + COUNT], at
    while i:
        i -= 1
        place = m[place_at(m, node, i)]
        # Both are in order, and what the child has lost for its age, its parent has lost too.
        if unknown and m[place_at(m, below, unknown - 1)] == place:
            unknown -= 1
            continue
        if place >> INDEX_BITS == without:
            continue
        index, record, length, to = place & INDEX, record_of(m, place >> INDEX_BITS), depth, at
        if m[node + CHILDREN] == LEAF:
            length = _agreeing(m, m[record + TEXT] + index, ending, end, depth, index)
            if not length:
                continue
            while to > first and found[0, to - 1] < length:
                for row in range(3):
                    found[row, to] = found[row, to - 1]
                to -= 1
        found[0, to], found[1, to], found[2, to] = length, m[record + TEXT] + index, m[record + LENGTH] - index
        at += 1
    return at


@inner
def _agreeing(m: np.ndarray, where: int, ending: np.ndarray, end: int, length: int, most: int) -> int:
    """How many tokens before a word of the structure agree with the ending, which is at least `length`."""
    if most > end:
        most = end
    if most > m[LONGEST]:
        most = m[LONGEST]
    while length < most and m[where - 1 - length] == ending[end - 1 - length]:
        length += 1
    return length
