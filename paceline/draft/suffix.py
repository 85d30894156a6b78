"""Suffix decoding (SuffixDecoding, 2411.04975): continue as the text did wherever its ending occurred before.

Two suffix structures are asked for the current ending: one of the request's own tokens, prompt included, and one of
what earlier and parallel requests of the same tenant were answered. The published method takes the single match whose
continuations promise most. Here all matches of all lengths vote: every context has a say, the longest first, and what
it leaves open goes to the next shorter one (the blending of PPM, Cleary & Witten 1984). How much a context leaves open
is counted, by its length and how often it occurred, from what was committed after earlier drafts. The tree takes the
likeliest paths first.

Confidence class: the chance that the drafter sees for the node, how long its longest match is, and whether the
request's own text says so.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from paceline.draft.base import NOTHING, DraftContext, Proposal
from paceline.draft.suffix_index import Occurrence, SuffixIndex
from paceline.draft.suffix_votes import Level, Matches, Openness, vote
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap
from paceline.errors import SpeculationSpecError

_CHANCES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)
"""Bounds between the classes of a node's chance ..."""
_LENGTHS = (3, 5, 9, 17, 33)
"""... and of its longest match."""
_MIDDLES = (0.01, 0.03, 0.07, 0.14, 0.27, 0.42, 0.6, 0.78, 0.91, 0.97)
_ENOUGH = 64
"""Occurrences that are considered of each structure."""
_WORTH_A_LOOK = 0.03
"""What follows a node is looked up anew where at least this chance would be left open otherwise."""
_READ_AT_ONCE = 4096
"""Tokens of a long prompt that are read in a step, so that nobody waits for it."""
_MAX_TENANTS = 64


@dataclass(slots=True)
class _Draft:
    """A tree in the making, and what is needed to learn from it."""

    after: list[Sequence[Level]]
    """The contexts that said what follows the ending (first entry) and each node, the longest first."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    key: list[int] = field(default_factory=list)

    def proposal(self) -> Proposal:
        """The tree."""
        tokens, parents, key = (np.array(c, dtype=np.int64) for c in (self.tokens, self.parents, self.key))
        return Proposal(tokens, parents, key)

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
        self.past = SuffixIndex()
        self.openness = Openness()


@dataclass(slots=True)
class _State:
    """A request: its own structure, and its number in its tenant's."""

    own: SuffixIndex
    tenant: _Tenant
    sequence: int
    shared: int
    """Tokens of the request that its tenant's structure has, the prompt's counted as if."""
    drafted_at: int = 0
    """Tokens there were when the last draft was made."""
    draft: _Draft | None = None


class SuffixDrafter:
    """Suffix decoding.

    Args:
        tokens: most output tokens of past and running requests that are kept, of all tenants together.
        chain: draft only the likeliest path (for rules that need a chain).

    Raises:
        SpeculationSpecError: `tokens` is negative.
    """

    name = "suffix"
    taps: frozenset[Tap] = frozenset()
    cost_per_token = False
    blocks = None

    def __init__(self, *, tokens: int = 500_000, chain: bool = False) -> None:
        if tokens < 0:
            raise SpeculationSpecError(
                f"suffix:tokens={tokens} is negative.", field="speculation", fix="0 keeps nothing of past requests."
            )
        self._most_tokens = tokens
        self._chain = chain
        self._states: dict[Request, _State] = {}
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._num_tokens = 0
        self.prior = np.repeat(_MIDDLES, (len(_LENGTHS) + 1) * 2)

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """The likeliest paths of every request whose ending is known."""
        return [self._propose(context) for context in contexts]

    def observe(self, observation: Observation) -> None:
        """Nothing to do: the committed tokens are read at the next proposal."""

    def forget(self, request: Request) -> None:
        """Keep the rest of its output for its tenant's other requests, and drop its own structure."""
        if request.num_output or request in self._states:
            self._share(request, self._state(request))
            del self._states[request]

    def _propose(self, context: DraftContext) -> Proposal:
        request = context.request
        state = self._state(request)
        self._learn(request, state)
        self._share(request, state)
        tokens, read = request.token_ids, state.own.num_tokens
        state.own.extend(0, tokens[read : read + _READ_AT_ONCE])
        state.drafted_at, state.draft = len(tokens), None
        matches = self._look_up(state, tokens[-state.own.longest :], 0)
        if matches is None or context.budget < 1:
            return NOTHING
        state.draft = self._grow(state, matches, tokens[-state.own.longest :], context.budget)
        return state.draft.proposal()

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
                chance = known * sum([matches.votes[i] for i in mine])
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
                known = (1.0 - unknown) / sum([matches.votes[i] for i in group])
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
            tenant = self._tenant(request.salt)
            own = SuffixIndex()
            own.open()
            found = self._states[request] = _State(own, tenant, tenant.past.open(), request.prompt_len)
        return found

    def _tenant(self, salt: str) -> _Tenant:
        if salt not in self._tenants:
            self._tenants[salt] = _Tenant()
            if len(self._tenants) > _MAX_TENANTS:
                self._evict(keep=salt)
        self._tenants.move_to_end(salt)
        return self._tenants[salt]

    def _evict(self, keep: str) -> None:
        """Drop the tenant that was idle longest; those with running requests stay."""
        busy = {request.salt for request in self._states} | {keep}
        idle = next((salt for salt in self._tenants if salt not in busy), None)
        if idle is not None:
            self._num_tokens -= self._tenants.pop(idle).past.num_tokens


def _likeliest(by_token: dict[int, list[int]], votes: list[float]) -> list[tuple[int, list[int]]]:
    """The token with most votes, as the only entry."""
    return sorted(by_token.items(), key=lambda entry: sum(votes[i] for i in entry[1]))[-1:]


def _class(chance: float, length: int, own: bool) -> int:
    """Confidence class of a node."""
    place = bisect_right(_CHANCES, chance) * (len(_LENGTHS) + 1) + bisect_right(_LENGTHS, length)
    return 2 * place + own


def _by_length(found: tuple[Occurrence, bool]) -> int:
    return -found[0][0]


def _size(index: SuffixIndex) -> int:
    return index.num_tokens
