"""A draft model (Leviathan et al. 2211.17192, Chen et al. 2302.01318): any causal LM with the target's tokenizer.

It runs on the same runner as the target with a paged cache of its own. Each round first feeds what was committed
since (after full acceptance that is two tokens), then drafts one token per forward for all requests together, ragged:
a request with a shorter budget leaves the later forwards.

Of a request with a grammar it drafts under the grammar, and no further than the text can go.

Under `coupled` tokens are drawn from the draft law with the target's noise, which makes agreement likely; under other
rules they come from a stream of their own and carry their laws. Confidence class: the largest raw probability of the
draft's next-token distribution, in tenths. It is known before the token is drawn, so cutting by it is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.arrays import BoolArray
from paceline.cache.block_manager import BlockManager
from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.engine.constraint import Constraint
from paceline.engine.request import Request
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law, build_law
from paceline.engine.types import Observation, Tap
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput

logger = logging.getLogger(__name__)
_CLASSES = 10


@dataclass(eq=False, slots=True)
class _Sequence:
    """What the draft cache holds of a request: `tokens[i]`'s KV is at index i of `table`."""

    table: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    confirmed: int = 0
    """Leading tokens known to be committed."""

    def follow(self, committed: Sequence[int]) -> None:
        """Drop what disagrees with the committed tokens, and always leave the last one to be fed."""
        start = self.confirmed
        self.confirmed = start + _common_length(self.tokens[start:], committed[start:])
        self.confirmed = min(self.confirmed, len(committed) - 1)
        del self.tokens[self.confirmed :]


@dataclass(eq=False, slots=True)
class _Draft:
    """One request's draft in the making."""

    context: DraftContext
    sequence: _Sequence
    tokens: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)

    def num_missing(self) -> int:
        """Committed tokens that the draft cache lacks."""
        return len(self.context.request.token_ids) - len(self.sequence.tokens)


class ModelDrafter:
    """Drafts with a second model.

    Args:
        runner: the draft model.
        blocks: its block manager.
        vocab_size: the target's; draft logits are cut or padded to it.
        coupled: draw with the target's noise and carry no laws.
        stop_ids: the target's end tokens, which `min_tokens` masks in both laws.
        max_model_len: longest sequence the draft model was made for; longer ones get no draft.
        max_tokens: most tokens of one step's catching up; a request whose prompt takes more waits its turn.
    """

    name = "draft"
    taps: frozenset[Tap] = frozenset()
    cost_per_token = True

    def __init__(
        self,
        runner: ModelRunner,
        blocks: BlockManager,
        *,
        vocab_size: int,
        coupled: bool,
        stop_ids: Sequence[int] = (),
        max_model_len: int = 1 << 30,
        max_tokens: int = 512,
    ) -> None:
        self._runner = runner
        self.blocks = blocks
        self._vocab_size = vocab_size
        self._coupled = coupled
        self._stop_ids = tuple(stop_ids)
        self._max_model_len = max_model_len
        self._max_tokens = max_tokens
        self._sequences: dict[Request, _Sequence] = {}
        self.prior = np.linspace(0.2, 0.95, _CLASSES)

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """A chain per request; nothing where the draft cache has no room."""
        drafts = [self._start(c) if c.budget > 0 else None for c in contexts]
        active = self._catch_up([d for d in drafts if d is not None])
        while active:
            rows = self._forward(active)
            extended = [self._extend(draft, row) for draft, row in zip(active, rows, strict=True)]
            active = [d for d, ok in zip(active, extended, strict=True) if ok and len(d.tokens) < d.context.budget]
        return [NOTHING if d is None or not d.tokens else self._proposal(d) for d in drafts]

    def _proposal(self, draft: _Draft) -> Proposal:
        return chain(draft.tokens, draft.keys, None if self._coupled else tuple(draft.laws))

    def observe(self, observation: Observation) -> None:
        """Nothing to do: the next round compares its cache with the committed tokens."""

    def forget(self, request: Request) -> None:
        """Release the request's draft blocks."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self.blocks.release(sequence.table)

    def _start(self, context: DraftContext) -> _Draft | None:
        request = context.request
        if len(request.token_ids) + context.budget > self._max_model_len:
            return None
        sequence = self._sequences.setdefault(request, _Sequence())
        sequence.follow(request.token_ids)
        self.blocks.shrink(sequence.table, len(sequence.tokens))
        if not self.blocks.grow(sequence.table, len(request.token_ids) + context.budget):
            self.forget(request)
            return None
        return _Draft(context, sequence)

    def _catch_up(self, drafts: Sequence[_Draft]) -> list[_Draft]:
        """Those who can draft now. Prompts are computed in chunks, at most `max_tokens` a step for all together;
        whoever lacks least goes first."""
        ready: list[_Draft] = []
        left = self._max_tokens
        for draft in sorted(drafts, key=_Draft.num_missing):
            committed, done = draft.context.request.token_ids, len(draft.sequence.tokens)
            if draft.num_missing() <= left:
                left -= draft.num_missing()
                ready.append(draft)
            elif left > 0:
                self._run([draft.sequence], [committed[done : done + left]], ())
                left = 0
        return ready

    def _forward(self, drafts: Sequence[_Draft]) -> NDArray[np.float32]:
        """Feed what each sequence has not seen; logits after its last token.  # [len(drafts), vocab]"""
        feeds = []
        for draft in drafts:
            full = draft.context.request.token_ids
            seen = len(draft.sequence.tokens)
            feeds.append([*full[seen:], *draft.tokens[max(0, seen - len(full)) :]])
        rows = (np.cumsum([len(feed) for feed in feeds]) - 1).tolist()
        logits = self._run([d.sequence for d in drafts], feeds, rows)
        host: NDArray[np.float32] = logits.float().cpu().numpy()
        return _fit_vocabulary(host, self._vocab_size)

    def _run(self, sequences: Sequence[_Sequence], feeds: Sequence[Sequence[int]], rows: Sequence[int]) -> torch.Tensor:
        inputs = tuple(
            SequenceInput(feed, np.arange(len(s.tokens), len(s.tokens) + len(feed)), len(s.tokens), s.table)
            for s, feed in zip(sequences, feeds, strict=True)
        )
        logits = self._runner.forward(ForwardBatch(inputs, rows))
        for sequence, feed in zip(sequences, feeds, strict=True):
            sequence.tokens.extend(feed)
        return logits

    def _extend(self, draft: _Draft, row: NDArray[np.float32]) -> bool:
        """Draw one more token; False where there is nothing to draw, which is known before anything is drawn."""
        request = draft.context.request
        allowed = None
        if request.constraint is not None:
            allowed = _allowed(request.constraint, draft.tokens)
            if allowed is None or not (row[allowed] > -np.inf).any():
                return False
        output = [*request.output_ids, *draft.tokens]
        masked = (*self._stop_ids, *request.params.stop_token_ids)
        law = build_law(row, request.params, request.token_ids[: request.prompt_len], output, masked, allowed)
        token = law.draw(self._noise(request, len(draft.tokens)))
        draft.tokens.append(token)
        draft.keys.append(_confidence_class(row))
        draft.laws.append(law)
        return True

    def _noise(self, request: Request, depth: int) -> NDArray[np.uint32]:
        """Noise of the draft token at `depth`: the target's own under `coupled`, else fresh in every round."""
        if request.params.greedy:
            return np.zeros(self._vocab_size, dtype=np.uint32)
        noise = Noise(request.seed, request.sample_index)
        position = len(request.token_ids) + depth
        if self._coupled:
            return noise.words(position, Stream.TARGET, self._vocab_size)
        return noise.words(position, Stream.DRAFT, self._vocab_size, round_id=len(request.token_ids))


def _allowed(constraint: Constraint, path: Sequence[int]) -> BoolArray | None:
    """The grammar's mask; None behind the end, and where the grammar fails (acceptance reports it).  # [vocab]"""
    try:
        return constraint.allowed(path)
    except Exception:
        logger.exception("a grammar failed; its request gets no draft")
        return None


def _confidence_class(row: NDArray[np.float32]) -> int:
    top_probability = 1.0 / float(np.exp(row - row.max()).sum())
    return min(int(top_probability * _CLASSES), _CLASSES - 1)


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _fit_vocabulary(rows: NDArray[np.float32], vocab_size: int) -> NDArray[np.float32]:
    missing = vocab_size - rows.shape[1]
    if missing > 0:
        return np.pad(rows, ((0, 0), (0, missing)), constant_values=-np.inf)
    return rows[:, :vocab_size]
