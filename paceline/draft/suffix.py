"""Suffix decoding (SuffixDecoding, 2411.04975): continue as the text did wherever its ending occurred before.

Two suffix structures are asked for the current ending: one of the request's own tokens, prompt included, and one of
what earlier and parallel requests of the same tenant were answered. The published method takes the single match whose
continuations promise most. Here all matches of all lengths vote: every context has a say, the longest first, and what
it leaves open goes to the next shorter one (the blending of PPM, Cleary & Witten 1984). How much a context leaves open
is counted, by its length and how often it occurred, from what was committed after earlier drafts. The tree takes the
likeliest paths first. All of that is compiled (`draft/suffixes`).

Confidence class: the chance that the drafter sees for the node, how long its longest match is, and whether the
request's own text says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from paceline.draft.base import NOTHING, DraftContext, Proposal
from paceline.draft.suffixes.index import SuffixIndex
from paceline.draft.suffixes.tree import LENGTHS, LOG, NUM_CHANCES, NUM_ROWS, grow, learn
from paceline.draft.suffixes.votes import new_openness
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap
from paceline.errors import SpeculationSpecError
from paceline.model.native.compiling import announced

_MIDDLES = (0.01, 0.03, 0.07, 0.14, 0.27, 0.42, 0.6, 0.78, 0.91, 0.97)
"""First guesses of the acceptance of a node, by its chance."""
_LONGEST = 64
"""Longest match that is told apart."""
_READ_AT_ONCE = 4096
"""Tokens of a long prompt that are read in a step, so that nobody waits for it."""
_MAX_TENANTS = 64
_SCRATCH = 1 << 12


@dataclass(frozen=True, slots=True)
class _Draft:
    """A tree, and what is needed to learn from it."""

    proposal: Proposal
    log: NDArray[np.int64]


@dataclass(slots=True)
class _Tenant:
    """What is kept of a tenant's requests."""

    past: SuffixIndex = field(default_factory=lambda: SuffixIndex(longest=_LONGEST))
    openness: NDArray[np.float64] = field(default_factory=new_openness)


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
        self._scratch = _scratch(_SCRATCH)
        self.prior = np.repeat(_MIDDLES, (len(LENGTHS) + 1) * 2)
        _compile()

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
        if context.budget < 1:
            return NOTHING
        state = self._state(request)
        self._learn(request, state)
        self._share(request, state)
        tokens, read = request.token_ids, state.own.num_tokens
        state.own.extend(0, _array(tokens[read : read + _READ_AT_ONCE]))
        state.drafted_at = len(tokens)
        state.draft = self._grow(state, _array(tokens[-_LONGEST:]), context.budget)
        return state.draft.proposal if state.draft else NOTHING

    def _grow(self, state: _State, ending: NDArray[np.int64], budget: int) -> _Draft | None:
        """A tree, or nothing where the ending is unknown."""
        tree = np.empty((3, budget), dtype=np.int64)
        own, tenant = state.own.memory, state.tenant
        structures = own, tenant.past.memory, state.sequence, tenant.openness
        while True:
            size, logged = grow(*structures, ending, self._chain, *self._scratch, tree)
            if size >= 0:
                break
            self._scratch = _scratch(2 * self._scratch[0].shape[1])
        if not size:
            return None
        tokens, parents, key = tree[:, :size]
        return _Draft(Proposal(tokens, parents, key), self._scratch[0][LOG, :logged].copy())

    def _learn(self, request: Request, state: _State) -> None:
        """Count what followed the contexts of the last draft."""
        committed = request.token_ids[state.drafted_at :]
        if state.draft is not None and committed:
            drafted = state.draft.proposal
            learn(state.tenant.openness, drafted.tokens, drafted.parents, state.draft.log, _array(committed))

    def _share(self, request: Request, state: _State) -> None:
        """Give the tenant's structure what the request has written."""
        tokens = request.token_ids[state.shared :]
        state.shared += len(tokens)
        if not tokens or not self._most_tokens:
            return
        before = state.tenant.past.num_tokens
        state.tenant.past.extend(state.sequence, _array(tokens))
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
            own = SuffixIndex(longest=_LONGEST)
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


@cache
def _compile() -> None:
    """Run everything that is compiled once, so that no request waits for that."""
    with announced(10):
        index = SuffixIndex()
        index.extend(index.open(), _array([1, 2, 1]))
        openness, tree = new_openness(), np.empty((3, 1), dtype=np.int64)
        ints, chances = _scratch(_SCRATCH)
        grow(index.memory, index.memory, -1, openness, _array([1]), False, ints, chances, tree)
        learn(openness, tree[0], tree[1], ints[LOG], _array([2]))
        index.drop(1)


def _scratch(size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return np.zeros((NUM_ROWS, size), dtype=np.int64), np.zeros((NUM_CHANCES, size))


def _array(tokens: Sequence[int]) -> NDArray[np.int64]:
    return np.array(tokens, dtype=np.int64)


def _size(index: SuffixIndex) -> int:
    return index.num_tokens
