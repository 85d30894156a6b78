"""Where the current ending has occurred before, and what came then: a suffix structure with bounded memory.

It answers what a suffix tree answers (the longest earlier match of an ending, how often each of its contexts occurred,
what followed), but it is read from the end of the context backwards and split only where that pays: a context has a
node of its own once it has occurred more than `recent` times, so a leaf holds *all* occurrences of its context and the
exact match lengths in it come from comparing tokens. Adding a token costs a walk of a few nodes, dropping the oldest
one the same, and nothing is ever rebuilt. Contexts more frequent than that keep their latest `recent` occurrences:
what came lately says more about what comes next than what came long ago.
"""

from __future__ import annotations

import numpy as np

from paceline.arrays import IntArray
from paceline.compiled import compiled
from paceline.draft.suffixes.memory import TOP, double, give, grown, inner, take
from paceline.draft.suffixes.nodes import (
    CHILDREN,
    COUNT,
    LEAF,
    PARENT,
    RECENT,
    ROOT,
    add_place,
    child_of,
    drop_child,
    has_room,
    make_child,
    place_at,
    plant,
    remove_place,
)

# Words of the header, beside those of memory.py and nodes.py.
DEPTH, LONGEST, NUM_TOKENS = 10, 11, 12
_RECORDS, _RECORDS_CLASS, FIRST, END = np.int64(13), 14, 15, 16
# Words of a sequence's record. The sequences that are kept are those from FIRST to before END.
TEXT, _TEXT_CLASS, LENGTH, _DROPPED = range(4)
INDEX_BITS = 28
INDEX = (1 << INDEX_BITS) - 1
"""Of a place: its lower bits are the index, the upper ones the sequence's number."""
_SHORT_TEXT = np.int64(3)
_AT_FIRST = 1 << 13
"""Words of an empty index."""


class SuffixIndex:
    """Occurrences of every context in a set of growing sequences.

    Args:
        recent: occurrences kept of a context that is more frequent than that.
        depth: longest context that has a node of its own.
        longest: longest match that is told apart.
    """

    def __init__(self, *, recent: int = 32, depth: int = 16, longest: int = 64) -> None:
        self.memory = m = np.empty(_AT_FIRST, dtype=np.int64)
        plant(m, recent)
        m[DEPTH], m[LONGEST] = depth, longest
        m[_RECORDS], m[_RECORDS_CLASS] = m[TOP], 2
        m[TOP] += 4

    @property
    def num_tokens(self) -> int:
        """Tokens that can be found."""
        return int(self.memory[NUM_TOKENS])

    def open(self) -> int:
        """Start a sequence; its number."""
        while (number := start_sequence(self.memory)) < 0:
            self.memory = grown(self.memory)
        return number

    def extend(self, sequence: int, tokens: IntArray) -> None:
        """Append tokens to a sequence. Nothing happens to one that has been dropped."""
        while (done := append_tokens(self.memory, sequence, tokens)) < len(tokens):
            self.memory, tokens = grown(self.memory), tokens[done:]

    def drop(self, count: int) -> None:
        """Forget the `count` oldest tokens: of the oldest sequences, from their start on."""
        drop_oldest(self.memory, count)


@compiled()
def start_sequence(m: np.ndarray) -> int:
    """Number of a new sequence, or -1: more memory is needed."""
    records = 1 << m[_RECORDS_CLASS]
    if m[TOP] + 2 * records + (1 << _SHORT_TEXT) > len(m):
        return -1
    if 4 * (m[END] - m[FIRST]) == records:
        double(m, _RECORDS)  # a ring: each is in both of its new places then
    number = m[END]
    record = record_of(m, number)
    m[record + TEXT], m[record + _TEXT_CLASS] = take(m, _SHORT_TEXT), _SHORT_TEXT
    m[record + LENGTH], m[record + _DROPPED] = 0, 0
    m[END] = number + 1
    return number


@compiled()
def append_tokens(m: np.ndarray, sequence: int, tokens: np.ndarray) -> int:
    """Append tokens until memory could run out; how many it were."""
    if sequence < m[FIRST]:
        return len(tokens)
    record, recent, depth = record_of(m, sequence), m[RECENT], m[DEPTH]
    for i in range(len(tokens)):
        # A leaf's places may go down to the deepest nodes and fan out there; and the text may double.
        if not has_room(m, depth + recent + 2, 4 * recent * (depth + 2) + (2 << m[record + _TEXT_CLASS])):
            return i
        index = m[record + LENGTH]
        if index == 1 << m[record + _TEXT_CLASS]:
            double(m, record + TEXT)
        m[m[record + TEXT] + index] = tokens[i]
        m[record + LENGTH] = index + 1
        m[NUM_TOKENS] += 1
        _add(m, sequence, index)
    return len(tokens)


@compiled()
def drop_oldest(m: np.ndarray, count: int) -> None:
    """Forget so many tokens. A sequence is gone with its last one."""
    while count > 0 and m[FIRST] != m[END]:
        sequence = m[FIRST]
        record = record_of(m, sequence)
        while count > 0 and m[record + _DROPPED] < m[record + LENGTH]:
            _remove(m, sequence, m[record + _DROPPED])
            m[record + _DROPPED] += 1
            m[NUM_TOKENS] -= 1
            count -= 1
        if m[record + _DROPPED] == m[record + LENGTH]:
            give(m, m[record + TEXT], m[record + _TEXT_CLASS])
            m[FIRST] = sequence + 1


@inner
def record_of(m: np.ndarray, sequence: int) -> int:
    """A sequence's record."""
    return m[_RECORDS] + ((4 * sequence) & ((1 << m[_RECORDS_CLASS]) - 1))


@inner
def _add(m: np.ndarray, sequence: int, index: int) -> None:
    """Add a place to all its contexts up to a leaf's; a leaf that has enough of them gets children first."""
    node, depth, text = m[ROOT], 0 * index, m[record_of(m, sequence) + TEXT]
    while True:
        if m[node + CHILDREN] == LEAF and m[node + COUNT] == m[RECENT] and depth < m[DEPTH]:
            _split(m, node, depth)
        add_place(m, node, (sequence << INDEX_BITS) + index)
        if m[node + CHILDREN] == LEAF or depth == index:  # at the sequence's start there is no longer context
            return
        depth += 1
        node = make_child(m, node, m[text + index - depth])


@inner
def _split(m: np.ndarray, node: int, depth: int) -> None:
    """Hand a leaf's places to children."""
    m[node + CHILDREN] = 0
    i = 0 * node
    while i < m[node + COUNT]:
        place = m[place_at(m, node, i)]
        if place & INDEX > depth:
            before = m[record_of(m, place >> INDEX_BITS) + TEXT] + (place & INDEX) - 1 - depth
            add_place(m, make_child(m, node, m[before]), place)
        i += 1


@inner
def _remove(m: np.ndarray, sequence: int, index: int) -> None:
    """Take a place out of all its contexts, and the contexts away that are empty then."""
    node, depth, text = m[ROOT], 0, m[record_of(m, sequence) + TEXT]
    while True:
        remove_place(m, node, (sequence << INDEX_BITS) + index)
        if m[node + CHILDREN] == LEAF or depth == index:
            break
        child = child_of(m, node, m[text + index - 1 - depth])
        if not child:
            break
        node, depth = child, depth + 1
    while node != m[ROOT] and not m[node + COUNT] and m[node + CHILDREN] <= 0:
        parent = m[node + PARENT]
        drop_child(m, node)
        node = parent
