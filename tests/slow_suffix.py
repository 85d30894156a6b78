"""Suffix decoding in plain Python: the slow reference of `draft/suffix.py` and `draft/suffixes`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from slow_suffix_index import Occurrence, SlowSuffixIndex

from paceline.engine.request import Request

Tree = tuple[list[int], list[int], list[int]]
_CHANCES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)
_LENGTHS = (3, 5, 9, 17, 33)
_ENOUGH = 64
_WORTH_A_LOOK = 0.03
_READ_AT_ONCE = 4096
_OWN_WEIGHT = 2.0


def total(values: Iterable[float]) -> float:
    """The sum, taken from left to right (`sum` is more exact than that from Python 3.12 on)."""
    so_far = 0.0
    for value in values:
        so_far += value
    return so_far


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
    each = total(share for _, share in shares)
    votes: list[float] = []
    for size, share in shares:
        votes += [each * _OWN_WEIGHT if own else each for _, own in found[len(votes) : size]]
        each -= share
    scale = (1.0 - left) / total(votes)
    occurrences, own = zip(*found, strict=True)
    lengths, texts, places = zip(*occurrences, strict=True)
    votes = [scale * value for value in votes]
    return Matches(depth, levels, list(lengths), list(texts), list(places), list(own), votes)


@dataclass(slots=True)
class _Draft:
    """A tree in the making, and what is needed to learn from it."""

    after: list[Sequence[Level]]
    """The contexts that said what follows the ending (first entry) and each node, the longest first."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    key: list[int] = field(default_factory=list)

    def path(self, node: int) -> list[int]:
        """Tokens from the root to a node."""
        tokens: list[int] = []
        while node >= 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]


class _Tenant:
    """What is kept of a tenant's requests."""

    def __init__(self) -> None:
        self.past = SlowSuffixIndex()
        self.openness = Openness()


@dataclass(slots=True)
class _State:
    """A request: its own structure, and its number in its tenant's."""

    own: SlowSuffixIndex
    tenant: _Tenant
    sequence: int
    shared: int
    """Tokens of the request that its tenant's structure has, the prompt's counted as if."""
    drafted_at: int = 0
    """Tokens there were when the last draft was made."""
    draft: _Draft | None = None


class SlowSuffixDrafter:
    """Proposals of one request after the other."""

    def __init__(self, *, tokens: int, chain: bool) -> None:
        self._most_tokens = tokens
        self._chain = chain
        self._states: dict[Request, _State] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._num_tokens = 0

    def forget(self, request: Request) -> None:
        if request.num_output or request in self._states:
            self._share(request, self._state(request))
            del self._states[request]

    def propose(self, request: Request, budget: int) -> Tree:
        """Tokens, parents and classes."""
        if budget < 1:
            return [], [], []
        state = self._state(request)
        self._learn(request, state)
        self._share(request, state)
        tokens, read = request.token_ids, state.own.num_tokens
        state.own.extend(0, tokens[read : read + _READ_AT_ONCE])
        state.drafted_at, state.draft = len(tokens), None
        matches = self._look_up(state, tokens[-state.own.longest :], 0)
        if matches is None:
            return [], [], []
        state.draft = self._grow(state, matches, tokens[-state.own.longest :], budget)
        return state.draft.tokens, state.draft.parents, state.draft.key

    def _look_up(self, state: _State, ending: Sequence[int], depth: int) -> Matches | None:
        """All occurrences of an ending whose last `depth` tokens are drafted."""
        own = [(o, True) for o in state.own.find(ending, enough=_ENOUGH)]
        past = [(o, False) for o in state.tenant.past.find(ending, enough=_ENOUGH, without=state.sequence)]
        if not own and not past:
            return None
        return vote(sorted(own + past, key=_by_length), depth, state.tenant.openness)

    def _grow(self, state: _State, matches: Matches, ending: Sequence[int], budget: int) -> _Draft:
        """Take the likeliest paths until the budget is spent."""
        draft, openness = _Draft([matches.levels]), state.tenant.openness
        heap: list[tuple[float, int, int, int, int, float, Matches, list[int]]] = []  # likeliest first
        count, node, depth, reach, group = 0, -1, 0, 1.0, list(range(len(matches.votes)))
        known, by_token = 1.0, matches.following(group, 0)
        while True:
            for token, mine in by_token.items() if not self._chain else _likeliest(by_token, matches.votes):
                chance = known * total(matches.votes[i] for i in mine)
                heappush(heap, (-reach * chance, count, node, token, depth + 1, chance, matches, mine))
                count += 1
            if not heap or len(draft.tokens) == budget:
                return draft
            reach, _, parent, token, depth, chance, matches, group = heappop(heap)
            reach, node = -reach, len(draft.tokens)
            draft.tokens.append(token)
            draft.parents.append(parent)
            length, own = matches.sorted_out(group)
            draft.key.append(_class(chance, length + depth - 1 - matches.depth, own))
            of = openness.of(length + depth - matches.depth, len(group))
            unknown = openness.chance(of)
            found = None
            if reach * unknown >= _WORTH_A_LOOK:
                found = self._look_up(state, [*ending, *draft.path(node)], depth)
            if found is not None:
                matches, group, known = found, list(range(len(found.votes))), 1.0
                by_token = matches.following(group, depth)
                draft.after.append(matches.levels)
            else:
                known = (1.0 - unknown) / total(matches.votes[i] for i in group)
                by_token = matches.following(group, depth)
                draft.after.append([Level(of, by_token)] if by_token else [])

    def _learn(self, request: Request, state: _State) -> None:
        """Count what followed the contexts of the last draft."""
        committed = request.token_ids[state.drafted_at :]
        if state.draft is None or not committed:
            return
        draft, openness = state.draft, state.tenant.openness
        nodes = {(p, t): i for i, (p, t) in enumerate(zip(draft.parents, draft.tokens, strict=True))}
        node = -1
        for token in committed:
            for level in draft.after[node + 1]:
                new = token not in level.following
                openness.learn(level.of, new)
                if not new:
                    break
            node = nodes.get((node, token), -1)
            if node < 0:
                break

    def _share(self, request: Request, state: _State) -> None:
        """Give the tenant's structure what the request has written."""
        tokens = request.token_ids[state.shared :]
        state.shared += len(tokens)
        if not tokens or not self._most_tokens:
            return
        before = state.tenant.past.num_tokens
        state.tenant.past.extend(state.sequence, tokens)
        self._num_tokens += state.tenant.past.num_tokens - before
        while self._num_tokens > self._most_tokens:
            # The tenant that keeps most gives: nobody loses what is his to another's flood.
            biggest = max((tenant.past for tenant in self._tenants.values()), key=_size)
            excess = min(self._num_tokens - self._most_tokens, biggest.num_tokens)
            biggest.drop(excess)
            self._num_tokens -= excess

    def _state(self, request: Request) -> _State:
        found = self._states.get(request)
        if found is None:
            tenant = self._tenants[request.salt] = (
                self._tenants.pop(request.salt, None) or _Tenant()
            )  # the latest: last
            own = SlowSuffixIndex()
            own.open()
            found = self._states[request] = _State(own, tenant, tenant.past.open(), request.prompt_len)
        return found


def _likeliest(by_token: dict[int, list[int]], votes: list[float]) -> list[tuple[int, list[int]]]:
    """The token with most votes, as the only entry."""
    return sorted(by_token.items(), key=lambda entry: total(votes[i] for i in entry[1]))[-1:]


def _class(chance: float, length: int, own: bool) -> int:
    """Confidence class of a node."""
    place = bisect_right(_CHANCES, chance) * (len(_LENGTHS) + 1) + bisect_right(_LENGTHS, length)
    return 2 * place + own


def _by_length(found: tuple[Occurrence, bool]) -> int:
    return -found[0][0]


def _size(index: SlowSuffixIndex) -> int:
    return index.num_tokens
