"""The nodes of a suffix structure: each knows its places, and is found from its parent by a token.

A node is a context, read backwards; its children's contexts have one token more in front. A place is a sequence's
number and the index of the token that followed the context there, in one word. Places lie in a ring, the oldest first.

Children are found by hashing (node, token). The table grows by one bucket at a time (linear hashing, Litwin 1980), so
no token waits until a big one is rebuilt.
"""

from __future__ import annotations

import numpy as np

from paceline.arrays import IntArray
from paceline.draft.suffixes.memory import HEADER, TOP, double, give, inner, take

# Words of the header, beside those of memory.py.
RECENT, NUM_NODES, ROOT = 1, 2, 3
_BUCKETS, _BUCKETS_CLASS, _NUM_BUCKETS = np.int64(5), 6, 7
# Words of a node. Without children it is a leaf; one that had some never becomes a leaf again.
PARENT, _TOKEN, _NEXT, PLACES, _PLACES_CLASS, OLDEST, COUNT, CHILDREN = range(8)
LEAF = -1
"""Number of children of a leaf."""
_NODE_CLASS = np.int64(3)
_FEW_PLACES = np.int64(2)
"""Class of the places of a new node. (For an `int`, Numba would compile what it is given to once more.)"""


def plant(m: IntArray, recent: int) -> None:
    """Make the root and the table."""
    m[:] = 0
    m[RECENT], m[ROOT] = recent, HEADER
    m[HEADER + CHILDREN], m[HEADER + PLACES], m[HEADER + _PLACES_CLASS] = LEAF, HEADER + 8, _FEW_PLACES
    m[_BUCKETS], m[_BUCKETS_CLASS], m[_NUM_BUCKETS] = HEADER + 12, 4, 8
    m[TOP] = HEADER + 28


@inner
def has_room(m: np.ndarray, nodes: int, more: int) -> bool:
    """Whether so many new nodes, their buckets and so many more words find room."""
    table = 1 << m[_BUCKETS_CLASS]
    if m[_NUM_BUCKETS] + nodes >= table:
        more += 4 * (table + nodes)
    return m[TOP] + 12 * nodes + more <= len(m)


@inner
def _bucket(m: np.ndarray, node: int, token: int) -> int:
    """The word of a child's bucket: of the last round's half as many where this round has not come yet."""
    mask = (1 << m[_BUCKETS_CLASS]) - 1
    bucket = ((node * 0x9E3779B1 + token) * 0x2545F4914F6CDD1D >> 32) & mask
    return m[_BUCKETS] + (bucket if bucket < m[_NUM_BUCKETS] else bucket & (mask >> 1))


@inner
def child_of(m: np.ndarray, node: int, token: int) -> int:
    """The child, or 0."""
    child = m[_bucket(m, node, token)]
    while child and (m[child + PARENT] != node or m[child + _TOKEN] != token):
        child = m[child + _NEXT]
    return child


@inner
def make_child(m: np.ndarray, node: int, token: int) -> int:
    """The child, new if there was none."""
    child = child_of(m, node, token)
    if child:
        return child
    child = take(m, _NODE_CLASS)
    m[child + PARENT], m[child + _TOKEN], m[child + CHILDREN] = node, token, LEAF
    m[child + PLACES], m[child + _PLACES_CLASS] = take(m, _FEW_PLACES), _FEW_PLACES
    m[child + OLDEST], m[child + COUNT] = 0, 0
    at = _bucket(m, node, token)
    m[child + _NEXT] = m[at]
    m[at] = child
    m[node + CHILDREN] += 1
    m[NUM_NODES] += 1
    if m[NUM_NODES] > m[_NUM_BUCKETS]:
        _add_bucket(m)
    return child


@inner
def drop_child(m: np.ndarray, child: int) -> None:
    """Forget a node that has neither places nor children."""
    at = _bucket(m, m[child + PARENT], m[child + _TOKEN])
    while m[at] != child:
        at = m[at] + _NEXT
    m[at] = m[child + _NEXT]
    m[m[child + PARENT] + CHILDREN] -= 1
    m[NUM_NODES] -= 1
    give(m, m[child + PLACES], m[child + _PLACES_CLASS])
    give(m, child, _NODE_CLASS)


@inner
def place_at(m: np.ndarray, node: int, i: int) -> int:
    """The word of the i-th oldest place."""
    return m[node + PLACES] + ((m[node + OLDEST] + i) & ((1 << m[node + _PLACES_CLASS]) - 1))


@inner
def add_place(m: np.ndarray, node: int, place: int) -> None:
    """Add a place. The oldest goes if there are too many."""
    count = m[node + COUNT]
    if count == m[RECENT]:
        m[node + OLDEST] += 1
        count -= 1
    elif count == 1 << m[node + _PLACES_CLASS]:
        m[node + OLDEST] &= count - 1
        double(m, node + PLACES)  # twice the content: what was wrapped around follows on
    m[place_at(m, node, count)] = place
    m[node + COUNT] = count + 1


@inner
def remove_place(m: np.ndarray, node: int, place: int) -> None:
    """Remove a place if it is there: most likely it is one of the oldest."""
    i, count = 0 * node, m[node + COUNT]
    while i < count and m[place_at(m, node, i)] != place:
        i += 1
    if i == count:
        return
    while i:
        m[place_at(m, node, i)] = m[place_at(m, node, i - 1)]
        i -= 1
    m[node + OLDEST] += 1
    m[node + COUNT] -= 1


@inner
def _add_bucket(m: np.ndarray) -> None:
    """Split the next bucket of the round in two."""
    new, mask = m[_NUM_BUCKETS], (1 << m[_BUCKETS_CLASS]) - 1
    old = m[_BUCKETS] + (new & (mask >> 1))
    child = m[old]
    m[_NUM_BUCKETS] = new + 1
    m[old] = m[m[_BUCKETS] + new] = 0
    while child:
        following = m[child + _NEXT]
        at = _bucket(m, m[child + PARENT], m[child + _TOKEN])
        m[child + _NEXT] = m[at]
        m[at] = child
        child = following
    if new == mask:
        double(m, _BUCKETS)
