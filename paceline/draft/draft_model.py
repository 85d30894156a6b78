"""A draft model with a paged cache of its own: it follows the committed tokens and scores draft trees level by level.

"Committed" is what it reads of a request: all committed tokens, or a shorter text that ends in the same way
(`reading.py`).

Each round first feeds what was committed since (after full acceptance of a chain that is two tokens). Draft nodes are
fed behind the committed tokens in the order in which they are scored; each sees the committed tokens and its ancestors.
Of the fed nodes one path stays in the cache for the next round, if it turns out to be what was committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.arrays import BoolArray
from paceline.cache.block_manager import BlockManager
from paceline.cache.paged_kv import slots_of
from paceline.draft.reading import Reading, WholeText
from paceline.engine.request import Request
from paceline.model.path import ForwardPath
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput


@dataclass(eq=False, slots=True)
class CachedSequence:
    """What the draft cache holds of a request: `tokens[i]`'s KV is at index i of `table`."""

    table: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    confirmed: int = 0
    """Leading tokens known to be committed."""
    unseen: int = 0
    """Tokens that `table` leaves out: it is a view of a cache, and what is behind them lies that much further front."""

    def follow(self, committed: Sequence[int]) -> None:
        """Drop what disagrees with the committed tokens, and always leave the last one to be fed."""
        start = self.confirmed
        self.confirmed = start + _common_length(self.tokens[start:], committed[start:])
        self.confirmed = min(self.confirmed, len(committed) - 1)
        del self.tokens[self.confirmed :]


@dataclass(eq=False, slots=True)
class Scratch:
    """The draft nodes of one round that went through the model, in the order in which they were fed."""

    request: Request
    committed: Sequence[int]
    """What the model reads of the request; the last one is the root."""
    sequence: CachedSequence
    room: int
    """Nodes that the round was opened for."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # fed node, -1: the root
    depths: list[int] = field(default_factory=list)
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    root_row: NDArray[np.float32] | None = None
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """Hidden states by fed node, where they were asked for."""
    place: dict[tuple[int, int], int] = field(default_factory=dict)
    """(fed parent, token) -> fed node."""

    def row(self, fed: int) -> NDArray[np.float32]:
        """Raw logits after a fed node (-1: the root).  # [vocab]"""
        if fed >= 0:
            return self.rows[fed]
        assert self.root_row is not None
        return self.root_row

    def num_missing(self) -> int:
        """Committed tokens that the cache lacks."""
        return len(self.committed) - len(self.sequence.tokens)

    def visible(self, old: int, missing: int) -> BoolArray | None:
        """What the newest tokens see of the nodes: `missing` committed ones, then fed nodes from number `old` on.

        None where that is plain causal order.  # [missing + new, old + missing + new]
        """
        if self.parents == list(range(-1, len(self.parents) - 1)):
            return None
        nodes = np.zeros((len(self.tokens), len(self.tokens)), dtype=np.bool_)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                nodes[i] = nodes[parent]
            nodes[i, i] = True
        if not missing:
            return nodes[old:]
        seen = np.zeros((missing + len(nodes), missing + len(nodes)), dtype=np.bool_)
        seen[:missing, :missing] = np.tri(missing, dtype=np.bool_)
        seen[missing:, :missing] = True
        seen[missing:, missing:] = nodes
        return seen


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one request wants scored in a forward: new nodes as (fed parent, token), parents before children."""

    scratch: Scratch
    nodes: Sequence[tuple[int, int]]


class DraftModel:
    """The model and its cache.

    Args:
        runner: the draft model.
        blocks: its block manager.
        vocab_size: the target's; draft logits are cut or padded to it.
        max_model_len: longest sequence the draft model was made for.
        max_tokens: most tokens of one step's catching up; a request whose prompt takes more waits its turn.
        reading: what it reads of a request.
    """

    def __init__(
        self,
        runner: ModelRunner,
        blocks: BlockManager,
        *,
        vocab_size: int,
        max_model_len: int,
        max_tokens: int,
        reading: Reading | None = None,
    ) -> None:
        self.runner = runner
        self.blocks = blocks
        self.path: ForwardPath | None = None
        """Of the forwards."""
        self.vocab_size = vocab_size
        self.num_embeddings = int(runner.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self.max_model_len = max_model_len
        self._max_tokens = max_tokens
        self._reading = reading or WholeText()
        self._sequences: dict[Request, CachedSequence] = {}

    def open(self, request: Request, nodes: int) -> Scratch | None:
        """Begin a round in which up to `nodes` draft nodes are fed; None where there is no room for them."""
        committed = self._reading.tokens(request)
        if len(committed) + nodes > self.max_model_len:
            return None
        sequence = self._sequences.setdefault(request, CachedSequence())
        sequence.follow(committed)
        self.blocks.shrink(sequence.table, len(sequence.tokens))
        if not self.blocks.grow(sequence.table, len(committed) + nodes):
            self.forget(request)
            return None
        return Scratch(request, committed, sequence, nodes)

    def make_room(self, scratch: Scratch, nodes: int) -> bool:
        """Room for that many nodes more, until the round is closed; False where there is none."""
        return self.blocks.grow(scratch.sequence.table, len(scratch.committed) + scratch.room + nodes)

    def catch_up(self, rounds: Sequence[Scratch]) -> list[Scratch]:
        """Those who can draft now. Prompts are computed in chunks, at most `max_tokens` a step for all together;
        whoever lacks least goes first."""
        ready: list[Scratch] = []
        left = self._max_tokens
        for scratch in sorted(rounds, key=Scratch.num_missing):
            missing = scratch.num_missing()
            if missing <= left:
                left -= missing
                ready.append(scratch)
            elif left > 0:
                done = len(scratch.sequence.tokens)
                chunk = scratch.committed[done : done + left]
                self.runner.forward(ForwardBatch((_plain(chunk, done, scratch.sequence.table),), ()))
                scratch.sequence.tokens.extend(chunk)
                left = 0
        return ready

    def score(self, wanted: Sequence[Wanted], *, hidden: bool = False) -> None:
        """One forward: what the caches lack of the committed tokens, and new nodes. Their rows go to the scratches."""
        inputs, rows, starts = [], list[int](), list[int]()
        flat = 0
        for want in wanted:
            made = self._input(want)
            inputs.append(made)
            count = len(want.nodes) + (want.scratch.root_row is None)
            starts.append(len(rows))
            flat += len(made.token_ids)
            rows.extend(range(flat - count, flat))
        batch = ForwardBatch(tuple(inputs), rows, self.path)
        states = None
        if hidden:
            logits, states = self.runner.forward_with_hidden(batch)
        else:
            logits = self.runner.forward(batch)
        host = _fit_vocabulary(logits.float().cpu().numpy(), self.vocab_size)
        for want, start in zip(wanted, starts, strict=True):
            scratch, fresh = want.scratch, want.scratch.root_row is None
            scratch.sequence.tokens.extend(scratch.committed[len(scratch.sequence.tokens) :])
            first = len(scratch.rows) - fresh
            if fresh:
                scratch.root_row = host[start]
            count = len(want.nodes) + fresh
            scratch.rows.extend(host[start + fresh : start + count])
            if states is not None:
                scratch.hidden |= {first + i: states[start + i] for i in range(count)}

    def close(self, scratch: Scratch, path: Sequence[int]) -> None:
        """End the round.

        Args:
            scratch: the round.
            path: the fed nodes, from the root down, that stay in the cache in case they are what will be committed.
        """
        table, start = scratch.sequence.table, len(scratch.sequence.tokens)
        if list(path) != list(range(len(path))):
            slots = slots_of(table, self.blocks.block_size, start, start + len(scratch.tokens))
            self.runner.kv.move(slots[list(path)].tolist(), slots[: len(path)].tolist())
        scratch.sequence.tokens.extend(scratch.tokens[node] for node in path)
        self.blocks.shrink(table, start + scratch.room)

    def forget(self, request: Request) -> None:
        """Release the request's draft blocks."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self.blocks.release(sequence.table)

    def evict(self) -> None:
        """Give all blocks back between rounds; what was cached is computed again when it is needed."""
        for request in list(self._sequences):
            self.forget(request)

    def _input(self, want: Wanted) -> SequenceInput:
        scratch = want.scratch
        committed, done = scratch.committed, len(scratch.sequence.tokens)
        missing = committed[done:]
        old = len(scratch.tokens)
        for parent, token in want.nodes:
            scratch.place[parent, token] = len(scratch.tokens)
            scratch.tokens.append(token)
            scratch.parents.append(parent)
            scratch.depths.append(1 if parent < 0 else scratch.depths[parent] + 1)
        root = len(committed) - 1
        positions = root + np.array(scratch.depths[old:], dtype=np.int64)
        return SequenceInput(
            [*missing, *scratch.tokens[old:]],
            np.concatenate([np.arange(done, len(committed)), positions]),
            done - scratch.sequence.unseen + old,
            scratch.sequence.table,
            scratch.visible(old, len(missing)) if want.nodes else None,
            root + np.array(scratch.depths[:old], dtype=np.int64),
        )


def _plain(tokens: Sequence[int], start: int, table: Sequence[int]) -> SequenceInput:
    return SequenceInput(tokens, np.arange(start, start + len(tokens)), start, table)


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
