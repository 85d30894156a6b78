"""Continuous batching: who runs in this step, with how many committed tokens.

First come, first served. Running requests go first (a decoding request needs one token of the budget, a prefilling
one its next chunk), then waiting ones are admitted while budget, sequence slots and blocks last. If a running request
finds no block, the youngest running one is preempted: its blocks are released, its tokens kept, and its KV recomputed
later (often from the prefix cache). Draft nodes are no part of this: they take only blocks that are left over.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from paceline.cache.block_manager import BlockManager
from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import Request
from paceline.engine.types import DraftBatch, ScheduledBatch, ScheduledRequest


class Scheduler:
    """Admission, chunked prefill and preemption over one block manager.

    Args:
        blocks: the target's block manager.
        max_num_seqs: most requests in a step.
        max_num_batched_tokens: most committed tokens in a step.
    """

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._preempted_now = False

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Forget a request and release its blocks."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.blocks.release(request.blocks)

    def schedule(self) -> ScheduledBatch:
        """Choose the requests of the next step and allocate the blocks of their committed tokens."""
        items: list[ScheduledRequest] = []
        budget = self.max_num_batched_tokens
        for request in list(self.running):
            if budget == 0:
                break
            if request not in self.running:  # preempted for an older one in this very loop
                continue
            chunk = min(len(request.token_ids) - request.num_computed, budget)
            if self._grow_or_preempt(request, request.num_computed + chunk):
                items.append(_share(request, chunk))
                budget -= chunk
        items = [item for item in items if item.request in self.running]
        if not self._preempted_now:
            items.extend(self._admit(budget))
        self._preempted_now = False
        return ScheduledBatch(tuple(items))

    def schedule_ahead(self, batch: ScheduledBatch, rows: Sequence[int], max_model_len: int) -> ScheduledBatch | None:
        """The step after one that is in flight, without its samples: its requests go on, each by one token.

        Args:
            batch: the step in flight.
            rows: of its samples, one for each request.
            max_model_len: longest sequence.

        Returns:
            None where the samples or a new admission decide who runs next.
        """
        if len(batch.sampling) < len(batch.items) or (self.waiting and len(self.running) < self.max_num_seqs):
            return None
        going_on = [
            (item.request, row) for item, row in zip(batch.items, rows, strict=True) if not item.request.finished
        ]
        if [request for request, _ in going_on] != self.running:
            return None
        items = []
        for request, row in going_on:
            place = len(request.token_ids)
            if request.num_output + 1 >= request.params.max_tokens or place + 1 >= max_model_len:
                continue  # the sample in flight is its last one
            if not self.blocks.grow(request.blocks, place + 1):
                return None
            items.append(ScheduledRequest(request, place, 1, samples=True, carried=row))
        return ScheduledBatch(tuple(items)) if items else None

    def _admit(self, budget: int) -> Iterable[ScheduledRequest]:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = next((r for r in self.waiting if self._may_start(r)), None)
            if request is None:
                return
            if request.params.prompt_logprobs is None:
                request.blocks, request.block_hashes = self.blocks.match_prefix(request.token_ids, request.salt)
            request.num_computed = len(request.blocks) * self.blocks.block_size
            chunk = min(len(request.token_ids) - request.num_computed, budget)
            if not self.blocks.grow(request.blocks, request.num_computed + chunk):
                self._reset(request)
                return
            request.stats.cached_tokens = max(request.stats.cached_tokens, request.num_computed)
            self.waiting.remove(request)
            self.running.append(request)
            if request.stats.scheduled is None:
                request.stats.scheduled = time.perf_counter()
            budget -= chunk
            yield _share(request, chunk)

    def _may_start(self, request: Request) -> bool:
        """A sibling sample waits until the first one has computed their common prompt, then finds it cached."""
        leader = request.leader
        if leader is None or leader.finished or leader.num_computed >= leader.prompt_len:
            return True
        return leader not in self.running and leader not in self.waiting  # it was never taken in

    def _grow_or_preempt(self, request: Request, num_tokens: int) -> bool:
        while not self.blocks.grow(request.blocks, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._preempted_now = True
        self.running.remove(request)
        self._reset(request)
        request.stats.preemptions += 1
        self.waiting.appendleft(request)

    def _reset(self, request: Request) -> None:
        self.blocks.release(request.blocks)
        request.block_hashes = []
        request.num_computed = 0

    def reserve_drafts(self, batch: ScheduledBatch, drafts: DraftBatch) -> DraftBatch:
        """Allocate blocks for the draft nodes; a tree that finds no room is cut to its first nodes that do.

        Which nodes fit depends on free memory alone, never on their tokens, so every rule stays exact.
        """
        trees = tuple(
            self._fit(item, tree) if len(tree) else tree
            for item, tree in zip(batch.sampling, drafts.trees, strict=True)
        )
        return DraftBatch(trees, drafts.seconds, drafts.slot_price)

    def _fit(self, item: ScheduledRequest, tree: DraftTree) -> DraftTree:
        committed = item.start + item.num_tokens
        table = item.request.blocks
        if self.blocks.grow(table, committed + len(tree)):
            return tree
        self.blocks.grow(table, (len(table) + self.blocks.num_available) * self.blocks.block_size)
        room = len(table) * self.blocks.block_size - committed
        return tree.keep(np.arange(min(room, len(tree))))


def _share(request: Request, num_tokens: int) -> ScheduledRequest:
    start = request.num_computed
    return ScheduledRequest(request, start, num_tokens, samples=start + num_tokens == len(request.token_ids))
