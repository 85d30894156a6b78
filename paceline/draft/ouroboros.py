"""Ouroboros (2402.13720): a draft model that drafts whole phrases, and phrases behind its draft.

A pool keeps phrases of L - 1 = 6 tokens by the token before them. It is used and filled in four ways, each of which can
be switched off by an option:

- `phrases`: the newest phrases after the newest draft token are guesses of what the draft model will say
  (`guess.py`), so that one of its forwards yields several tokens. The pool is filled with what the draft model writes;
  the release has a lookahead window for that, which costs rows in every forward, and these phrases cost none.
- `suffixes`: the newest phrases after the draft's last token become branches behind it, which cost no draft forward.
- `feed`: the target's own text becomes phrases. Behind a rejection, so do runs of the target's likeliest tokens with
  which the draft kept agreeing; and a suffix that was tried is written over with what the target said along it.
- `reuse`: the pool outlives the request, per tenant salt.

Whatever the pool holds, the draft is the draft model's own, and suffixes are chosen without looking at any draw. Behind
a draft that was *drawn* (at temperature above 0 under other rules than `coupled`) nothing can be chosen, so there are
no suffixes. With them, half of the budget is theirs.

Confidence classes: the shape's for the draft, and for suffixes their position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paceline.arrays import FloatArray
from paceline.cache.block_manager import BlockManager
from paceline.draft.base import DraftContext, Proposal
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.phrases import Phrase, PhrasePool
from paceline.draft.shapes.base import TreeShape
from paceline.draft.tenants import Tenants
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap
from paceline.errors import SpeculationSpecError

LENGTH = 6
"""Tokens of a phrase (the paper's L counts the token before it, too)."""
_MAX_TENANTS = 16
_SUFFIX_PRIOR = np.array([0.35, 0.55, 0.6, 0.65, 0.65, 0.65])


class _Pools:
    """Pools of requests: their tenants', or their own.

    Args:
        reuse: whether requests of a tenant share one.
    """

    def __init__(self, *, reuse: bool) -> None:
        self._reuse = reuse
        self._tenants = Tenants(lambda: PhrasePool(LENGTH), _MAX_TENANTS)
        self._own: dict[Request, PhrasePool] = {}

    def of(self, request: Request) -> PhrasePool:
        if self._reuse:
            return self._tenants.of(request)
        return self._own.setdefault(request, PhrasePool(LENGTH))

    def forget(self, request: Request) -> None:
        self._tenants.forget(request)
        self._own.pop(request, None)


class PhraseGuesser:
    """Guesses the newest phrases, and learns what the draft model writes.

    Args:
        pools: where they are.
        phrases: how many are tried in a forward of the draft model.
    """

    def __init__(self, pools: _Pools, phrases: int) -> None:
        self._pools = pools
        self._phrases = phrases
        self.most = phrases * LENGTH

    def guess(self, request: Request, path: Sequence[int], most: int, depth: int) -> Sequence[Phrase]:  # noqa: ARG002
        """The newest phrases after the path."""
        return self._pools.of(request).newest(path[-1] if path else request.token_ids[-1], self._phrases)

    def learn(self, request: Request, path: Sequence[int], likeliest: Sequence[int]) -> None:
        """Phrases that end in what the draft model likes best."""
        pool = self._pools.of(request)
        before = request.token_ids[-LENGTH:]
        text = [*before, *path]
        for i, token in enumerate(likeliest):
            at = len(before) + i
            if at >= LENGTH:
                pool.add(text[at - LENGTH], (*text[at - LENGTH + 1 : at], token))

    def forget(self, request: Request) -> None:
        """Pools are forgotten by their owner."""


@dataclass(frozen=True, slots=True)
class _Round:
    """What was proposed for a request."""

    path: tuple[int, ...]
    """Tokens of the draft's first path."""
    suffixes: tuple[Phrase, ...]
    """Tried behind it."""


class OuroborosDrafter:
    """A draft model with a phrase pool.

    Args:
        shape: of the draft model's trees.
        chain: propose chains only, so one suffix at most.
        phrases: tried in every forward of the draft model; 0: one token per forward.
        suffixes: tried behind a draft; 0: none.
        feed: whether the target's tokens become phrases.
        reuse: whether the pool outlives the request.
        model: what `ModelDrafter` takes beside these.

    Raises:
        SpeculationSpecError: a number is negative.
    """

    name = "ouroboros"
    taps = frozenset({Tap.TOP_IDS})
    cost_per_token = True

    def __init__(
        self,
        *,
        shape: TreeShape,
        chain: bool = False,
        phrases: int = 3,
        suffixes: int = 3,
        feed: int = 1,
        reuse: int = 1,
        **model: Any,
    ) -> None:
        if phrases < 0 or suffixes < 0:
            raise SpeculationSpecError(
                "ouroboros cannot try fewer than no phrases.",
                field="speculation",
                fix="Write phrases=3 and suffixes=3, or 0 to go without.",
            )
        self._pools = _Pools(reuse=bool(reuse))
        self.draft = ModelDrafter(shape=shape, guess=PhraseGuesser(self._pools, phrases), **model)
        self._suffixes = min(suffixes, 1) if chain else suffixes
        self._feed = bool(feed)
        self._first_key = len(shape.prior)
        self._rounds: dict[Request, _Round] = {}
        self.prior: FloatArray = np.concatenate([shape.prior, _SUFFIX_PRIOR])
        self.width = shape.width * (2.0 if self._suffixes else 1.0)

    @property
    def hidden_size(self) -> int:
        """Of the draft model's last hidden states."""
        return self.draft.hidden_size

    @property
    def blocks(self) -> BlockManager | None:
        """Of the draft model's cache."""
        return self.draft.blocks

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """A draft per request, and suffixes behind it."""
        halved = [replace(c, budget=c.budget - self._room(c)) for c in contexts]
        drafts = self.draft.propose(halved)
        return [self._lengthened(context, draft) for context, draft in zip(contexts, drafts, strict=True)]

    def _room(self, context: DraftContext) -> int:
        """Nodes kept for suffixes; none where the draft alone can reach the end of the text."""
        request = context.request
        drawn = not (request.params.greedy or self.draft.coupled)
        reaches_end = context.budget >= request.params.max_tokens - request.num_output - 1
        return 0 if drawn or reaches_end else min(context.budget // 2, self._suffixes * LENGTH)

    def _lengthened(self, context: DraftContext, draft: Proposal) -> Proposal:
        if not len(draft):
            self._rounds.pop(context.request, None)
            return draft
        nodes = _first_path(draft)
        path = tuple(draft.tokens[nodes].tolist())
        room = self._room(context)
        suffixes = self._pools.of(context.request).newest(path[-1], self._suffixes) if room else []
        self._rounds[context.request] = _Round(path, tuple(suffixes))
        return self._with_suffixes(draft, nodes[-1], suffixes, room)

    def _with_suffixes(self, draft: Proposal, end: int, suffixes: Sequence[Phrase], room: int) -> Proposal:
        """The draft, and behind its node `end` the beginnings of the suffixes: `room` nodes, all equally deep."""
        tokens, parents, keys = draft.tokens.tolist(), draft.parents.tolist(), draft.key.tolist()
        place: dict[Phrase, int] = {(): end}
        for depth in range(LENGTH):
            for phrase in suffixes:
                if len(tokens) < len(draft) + room and phrase[: depth + 1] not in place:
                    place[phrase[: depth + 1]] = len(tokens)
                    tokens.append(phrase[depth])
                    parents.append(place[phrase[:depth]])
                    keys.append(self._first_key + depth)
        assert len(tokens) == len(draft) or draft.origin is Origin.CHOSEN
        return Proposal(
            np.array(tokens, dtype=np.int64),
            np.array(parents, dtype=np.int64),
            np.array(keys, dtype=np.int64),
            draft.laws,
            draft.origin,
        )

    def observe(self, observation: Observation) -> None:
        """Feed the pool."""
        tried = self._rounds.pop(observation.request, None)
        if not self._feed:
            return
        request, pool = observation.request, self._pools.of(observation.request)
        text = request.token_ids[-LENGTH - len(observation.committed) :]
        pool.add_text(text, len(text) - len(observation.committed))
        if tried is not None and observation.top_ids is not None:
            self._learn(pool, tried, observation)

    def _learn(self, pool: PhrasePool, tried: _Round, observation: Observation) -> None:
        verified = _Verified(observation)
        rows = list(verified.along(0, tried.path))
        keys = (int(observation.row_tokens[0]), *tried.path)
        said = [verified.likeliest(row) for row in rows]
        for start in range(len(observation.committed), len(said) - LENGTH + 1):
            run = tuple(said[start : start + LENGTH])
            if run[:-1] == keys[start + 1 : start + LENGTH]:
                pool.add(keys[start], run)
        if len(rows) == len(keys):
            for suffix in tried.suffixes:
                along = [verified.likeliest(row) for row in verified.along(rows[-1], suffix)][:LENGTH]
                if len(along) > 1:
                    pool.replace(keys[-1], suffix, (*along, *suffix[len(along) :]))

    def forget(self, request: Request) -> None:
        """Release the request's draft blocks and state."""
        self.draft.forget(request)
        self._pools.forget(request)
        self._rounds.pop(request, None)


class _Verified:
    """The verified tree by its tokens, and what the target said after every node."""

    def __init__(self, observation: Observation) -> None:
        assert observation.top_ids is not None, "the tap was asked for"
        self._best = observation.top_ids[:, 0].tolist()
        rows = zip(observation.row_parents.tolist(), observation.row_tokens.tolist(), strict=True)
        self._children = {(parent, token): row for row, (parent, token) in enumerate(rows)}

    def likeliest(self, row: int) -> int:
        """The target's likeliest token after a row's."""
        return int(self._best[row])

    def along(self, row: int, tokens: Sequence[int]) -> Iterator[int]:
        """The row, and those of `tokens` after it as far as they were verified."""
        yield row
        for token in tokens:
            found = self._children.get((row, token))
            if found is None:
                return
            row = found
            yield row


def _first_path(draft: Proposal) -> list[int]:
    """Nodes of the path of first children."""
    first: dict[int, int] = {}
    for node, parent in enumerate(draft.parents.tolist()):
        first.setdefault(parent, node)
    nodes = [first[-1]]
    while nodes[-1] in first:
        nodes.append(first[nodes[-1]])
    return nodes
