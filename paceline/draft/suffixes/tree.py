"""A draft tree of the likeliest paths, and what its contexts have learned once it is known how the text went on.

Occurrences that go on alike form a group; a group that may become a node is a candidate, and so is every node.
"""

from __future__ import annotations

import numpy as np

from paceline.compiled import compiled
from paceline.draft.suffixes.heap import pop, push
from paceline.draft.suffixes.matches import find
from paceline.draft.suffixes.memory import inner
from paceline.draft.suffixes.votes import context_class, count, open_chance, rank, vote

CHANCES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95])
"""Bounds between the classes of a node's chance ..."""
LENGTHS = np.array([3, 5, 9, 17, 33])
"""... and of its longest match."""
_ENOUGH = np.int64(64)
"""Occurrences that are considered of each structure."""
_WORTH_A_LOOK = 0.03
"""What follows a node is looked up anew where at least this chance would be left open otherwise."""
_NONE = np.int64(-1)
_MOST = 1 << 8
"""More than what is found at once: of two structures, up to `_ENOUGH` - 1 and one context's occurrences."""

# Rows of whole numbers. Of occurrences: what `find` and `vote` say, and whether they are in the request's own text.
_LENGTH, _WHERE, _LEFT, _LEVEL, _OWN = range(5)
# Of candidates: token, parent node, depth, draft tokens in the ending that was looked up, and where the group stands.
_TOKEN, _PARENT, _DEPTH, _LOOKED_AT, _FIRST, _SIZE = range(5, 11)
# Members of groups, and what each belongs to while they are sorted; a hash table for that; who waits; what to learn.
_MEMBER, _GROUP, _TABLE, _HEAP, LOG = range(11, 16)
# The ending with a path, and how much of the rows is in use.
_TEXT, _USED = 16, 17
NUM_ROWS = 18
# Rows of chances: votes of occurrences; of candidates, their votes, what comes of them, and that with all before them.
_VOTE, _VOTES, _CHANCE, REACH = range(4)
NUM_CHANCES = 4
# Entries of the row _USED.
_OCCURRENCES, _MEMBERS, _CANDIDATES, _WAITING, _LOGGED = range(5)


@compiled()
def grow(
    own: np.ndarray,
    past: np.ndarray,
    without: int,
    openness: np.ndarray,
    ending: np.ndarray,
    chain: bool,
    ints: np.ndarray,
    chances: np.ndarray,
    tree: np.ndarray,
) -> tuple[int, int]:
    """Take the likeliest paths until the budget is spent.

    Args:
        own: structure of the request's own text.
        past: that of its tenant's requests ...
        without: ... of which this sequence does not count.
        openness: what is known of contexts.
        ending: last tokens of the request.
        chain: draft only the likeliest path.
        ints: scratch.  # [NUM_ROWS, n]
        chances: scratch.  # [NUM_CHANCES, n]
        tree: tokens, parents and classes of the nodes.  # [3, budget]

    Returns:
        The number of nodes, and of entries of the row `LOG` that `learn` needs. Without scratch enough: -1.
    """
    budget, end = tree.shape[1], len(ending)
    text, log, used = ints[_TEXT], ints[LOG], ints[_USED]
    if end + budget > len(text):
        return -1, 0
    for i in range(end):
        text[i] = ending[i]
    for i in range(_LOGGED):
        used[i] = 0
    used[_LOGGED] = budget + 1
    node, group, num_nodes, depth, of, unknown, reach = _NONE, _NONE, 0 * budget, 0, 0, 1.0, 1.0
    while True:
        if used[_MEMBERS] + 3 * _MOST > len(text) or used[_LOGGED] + 3 * _MOST > len(text):
            return -1, 0
        entry = used[_LOGGED]
        log[node + 1] = entry
        size, known = 0, 1.0
        if reach * unknown >= _WORTH_A_LOOK:
            size = _look_up(own, past, without, openness, text, end + depth, ints, chances, used)
        if size:
            first, looked_at = used[_MEMBERS] - size, depth
        elif node < 0:
            return 0, 0
        else:
            first, size, looked_at = ints[_FIRST, group], ints[_SIZE, group], ints[_LOOKED_AT, group]
            known = (1.0 - unknown) / chances[_VOTES, group]
            log[entry], log[entry + 2] = 1, of
        candidates = used[_CANDIDATES]
        _follow(own, past, first, size, depth - looked_at, ints, chances[_VOTE], chances[_VOTES], used)
        _log_followers(entry, candidates, looked_at == depth, ints, used)
        _await(candidates, known, reach, node, depth + 1, looked_at, chain, ints, chances, used)
        if not used[_WAITING] or num_nodes == budget:
            return num_nodes, used[_LOGGED]
        group = pop(ints[_HEAP], used[_WAITING], chances[REACH])
        used[_WAITING] -= 1
        reach, depth, looked_at = chances[REACH, group], ints[_DEPTH, group], ints[_LOOKED_AT, group]
        node, num_nodes = num_nodes, num_nodes + 1
        tree[0, node], tree[1, node] = ints[_TOKEN, group], ints[_PARENT, group]
        length, mine = _sorted_out(group, ints)
        tree[2, node] = _node_class(chances[_CHANCE, group], length + depth - 1 - looked_at, mine)
        of = context_class(length + depth - looked_at, ints[_SIZE, group])
        unknown = open_chance(openness, of)
        _write_path(tree, node, text, end + depth)


@compiled()
def learn(
    openness: np.ndarray, tokens: np.ndarray, parents: np.ndarray, log: np.ndarray, committed: np.ndarray
) -> None:
    """Count what followed the contexts of a draft."""
    node = _NONE
    for k in range(len(committed)):
        token, entry = committed[k], log[node + 1]
        num_levels, num_tokens = log[entry], log[entry + 1]
        level = num_levels
        for at in range(entry + 2 + num_levels, entry + 2 + num_levels + 2 * num_tokens, 2):
            if log[at] == token:
                level = log[at + 1]
                break
        for i in range(level + 1 if level < num_levels else level):
            count(openness, log[entry + 2 + i], i < level)
        child = node + 1
        while child < len(tokens) and (parents[child] != node or tokens[child] != token):
            child += 1
        if child == len(tokens):
            return
        node = child


@inner
def _look_up(
    own: np.ndarray,
    past: np.ndarray,
    without: int,
    openness: np.ndarray,
    text: np.ndarray,
    end: int,
    ints: np.ndarray,
    chances: np.ndarray,
    used: np.ndarray,
) -> int:
    """All occurrences of an ending as one group, with their votes; how many. Its contexts are logged."""
    first, past_at = used[_OCCURRENCES], ints.shape[1] - _MOST
    num_own = find(own, text, end, _ENOUGH, _NONE, ints, first)
    num_past = find(past, text, end, _ENOUGH, without, ints, past_at)
    size = num_own + num_past
    if not size:
        return 0
    i, j = first + num_own - 1, past_at + num_past - 1
    for to in range(first + size - 1, first - 1, -1):  # from the end, so that nothing has to make room
        mine = j < past_at or (i >= first and ints[_LENGTH, i] < ints[_LENGTH, j])
        for row in range(3):  # what `find` says
            ints[row, to] = ints[row, i if mine else j]
        ints[_OWN, to] = mine
        if mine:
            i -= 1
        else:
            j -= 1
    entry = used[_LOGGED]
    ints[LOG, entry] = vote(
        openness, ints[_LENGTH], ints[_OWN], chances[_VOTE], ints[_LEVEL], first, first + size, ints[LOG], entry + 2
    )
    for i in range(size):
        ints[_MEMBER, used[_MEMBERS] + i] = first + i
    used[_OCCURRENCES] += size
    used[_MEMBERS] += size
    return size


@inner
def _follow(
    own: np.ndarray,
    past: np.ndarray,
    first: int,
    size: int,
    ahead: int,
    ints: np.ndarray,
    vote: np.ndarray,
    votes: np.ndarray,
    used: np.ndarray,
) -> None:
    """Group the occurrences of a group by the token so far ahead, in the order in which tokens come up."""
    members, groups, table = ints[_MEMBER], ints[_GROUP], ints[_TABLE]
    tokens, firsts, sizes = ints[_TOKEN], ints[_FIRST], ints[_SIZE]
    slots = 2
    while slots < 2 * size:
        slots *= 2
    for slot in range(slots):
        table[slot] = -1
    candidates = used[_CANDIDATES]
    for k in range(size):
        i = members[first + k]
        groups[k] = -1
        if ahead >= ints[_LEFT, i]:
            continue
        where = ints[_WHERE, i] + ahead
        token = own[where] if ints[_OWN, i] else past[where]
        slot = (token * 0x9E3779B1 >> 16) & (slots - 1)
        while table[slot] >= 0 and tokens[table[slot]] != token:
            slot = (slot + 1) & (slots - 1)
        if table[slot] < 0:
            new = used[_CANDIDATES]
            table[slot], tokens[new], sizes[new], votes[new] = new, token, 0, 0.0
            used[_CANDIDATES] += 1
        groups[k] = table[slot]
        sizes[groups[k]] += 1
        votes[groups[k]] += vote[i]
    for new in range(candidates, used[_CANDIDATES]):
        firsts[new] = used[_MEMBERS]
        used[_MEMBERS] += sizes[new]
        sizes[new] = 0
    for k in range(size):
        if groups[k] >= 0:
            members[firsts[groups[k]] + sizes[groups[k]]] = members[first + k]
            sizes[groups[k]] += 1


@inner
def _log_followers(entry: int, candidates: int, looked_up: bool, ints: np.ndarray, used: np.ndarray) -> None:
    """Log what followed the contexts of the entry, and the longest context that each token followed."""
    log = ints[LOG]
    log[entry + 1] = used[_CANDIDATES] - candidates
    if not log[entry + 1]:
        log[entry] = 0
    at = entry + 2 + log[entry]
    for new in range(candidates, used[_CANDIDATES]):
        log[at] = ints[_TOKEN, new]
        log[at + 1] = ints[_LEVEL, ints[_MEMBER, ints[_FIRST, new]]] if looked_up else 0
        at += 2
    used[_LOGGED] = at


@inner
def _await(
    candidates: int,
    known: float,
    reach: float,
    parent: int,
    depth: int,
    looked_at: int,
    chain: bool,
    ints: np.ndarray,
    chances: np.ndarray,
    used: np.ndarray,
) -> None:
    """Let new candidates wait for their turn: all, or the one with most votes."""
    best = candidates - 1
    for new in range(candidates, used[_CANDIDATES]):
        ints[_PARENT, new], ints[_DEPTH, new], ints[_LOOKED_AT, new] = parent, depth, looked_at
        chances[_CHANCE, new] = known * chances[_VOTES, new]
        chances[REACH, new] = reach * chances[_CHANCE, new]
        if best < candidates or chances[_VOTES, new] >= chances[_VOTES, best]:
            best = new
        if not chain:
            push(ints[_HEAP], used[_WAITING], chances[REACH], new)
            used[_WAITING] += 1
    if chain and best >= candidates:
        push(ints[_HEAP], used[_WAITING], chances[REACH], best)
        used[_WAITING] += 1


@inner
def _sorted_out(group: int, ints: np.ndarray) -> tuple[int, bool]:
    """Longest match of a group when it was looked up, and whether one is in the request's own text."""
    first = ints[_FIRST, group]
    for k in range(first, first + ints[_SIZE, group]):
        if ints[_OWN, ints[_MEMBER, k]]:
            return ints[_LENGTH, ints[_MEMBER, first]], True
    return ints[_LENGTH, ints[_MEMBER, first]], False


@inner
def _node_class(chance: float, length: int, own: bool) -> int:
    """Confidence class of a node."""
    return 2 * (rank(CHANCES, chance) * (len(LENGTHS) + 1) + rank(LENGTHS, length)) + own


@inner
def _write_path(tree: np.ndarray, node: int, text: np.ndarray, end: int) -> None:
    """Write the tokens from the root to a node before an index."""
    while node >= 0:
        end -= 1
        text[end] = tree[0, node]
        node = tree[1, node]
