"""Commit: the one place that appends tokens, keeps the KV of accepted nodes and releases that of rejected ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from paceline.cache.block_manager import BlockManager
from paceline.cache.paged_kv import PagedKV, slots_of
from paceline.engine.detokenizer import Detokenizer
from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import FinishReason, Request, RequestStats
from paceline.engine.sampling import token_logprobs
from paceline.engine.types import AcceptedStep, RequestOutput, ScheduledRequest, TargetScores, TokenLogprobs, Walk
from paceline.errors import RequestError

logger = logging.getLogger(__name__)
_OWN = (None,)
"""The drafter of a token that is the target's own."""


class Committer:
    """Turns walks into committed tokens.

    Args:
        kv: the target's cache, compacted along accepted paths.
        blocks: its block manager.
        tokenizer: for text and stop strings.
        eos_token_ids: the model's end tokens.
        max_model_len: longest sequence.
    """

    def __init__(
        self,
        kv: PagedKV,
        blocks: BlockManager,
        tokenizer: Any,
        eos_token_ids: Sequence[int],
        max_model_len: int,
    ) -> None:
        self._kv = kv
        self._blocks = blocks
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self._text: dict[Request, Detokenizer] = {}
        self._prompt_logprobs: dict[Request, list[TokenLogprobs | None]] = {}

    def commit(self, step: AcceptedStep, now: float) -> tuple[RequestOutput, ...]:
        """Commit a step. Requests that failed in acceptance, or fail here, end with their error; others go on."""
        for item in step.batch.items:
            if not item.samples:
                item.request.num_computed += item.num_tokens
                self._publish(item.request)
        outputs = []
        moves: tuple[list[int], list[int]] = ([], [])
        rows = zip(
            step.batch.sampling,
            step.verified.trees,
            step.acceptance.walks,
            step.scores.first_row,
            strict=True,
        )
        for item in step.batch.items if step.scores.prompt_rows else ():
            self._keep_prompt_logprobs(item, step.scores)
        for item, tree, walk, row in rows:
            request = item.request
            if request.finished:  # while the step was in flight
                continue
            try:
                if walk is None:
                    outputs.append(self.fail(request, step.acceptance.errors[request.id]))
                else:
                    outputs.append(self._commit_one(request, tree, walk, row, step.scores, moves, now))
            except Exception as error:
                logger.exception("request %s failed in commit", request.id)
                outputs.append(self.fail(request, error))
        if moves[0]:
            self._kv.move(*moves)
        for item in step.batch.sampling:
            if item.request.blocks:
                self._publish(item.request)
        return tuple(outputs)

    def fail(self, request: Request, error: Exception) -> RequestOutput:
        """End one request with an error."""
        request.finish_reason = FinishReason.ERROR
        field = error.field if isinstance(error, RequestError) else None
        return RequestOutput(request.id, finish_reason=FinishReason.ERROR, error=str(error), error_field=field)

    def forget(self, request: Request) -> None:
        """Drop the state of a finished request."""
        self._text.pop(request, None)
        self._prompt_logprobs.pop(request, None)

    def _commit_one(
        self,
        request: Request,
        tree: DraftTree,
        walk: Walk,
        row: int,
        scores: TargetScores,
        moves: tuple[list[int], list[int]],
        now: float,
    ) -> RequestOutput:
        root = len(request.token_ids) - 1
        pieces, finish = self._append(request, walk.tokens)
        kept = len(pieces)
        path = walk.path[:kept]
        if path:
            self._compact(request, root, path, moves)
        request.num_computed = min(root + 1 + len(path), len(request.token_ids) - 1)
        self._count(request, tree, path, kept, now)
        request.stats.target_transform = scores.transform
        request.finish_reason = finish
        return RequestOutput(
            request.id,
            token_ids=walk.tokens[:kept],
            pieces=tuple(pieces),
            drafters=(*[tree.drafter[node] for node in path], *_OWN[: kept - len(path)]),
            num_draft_tokens=len(tree.tokens),
            logprobs=() if request.params.logprobs is None else self._logprobs(request, walk, kept, row, scores),
            prompt_logprobs=tuple(self._prompt_logprobs.pop(request, ())) if self._prompt_logprobs else (),
            finish_reason=finish,
        )

    def _append(self, request: Request, tokens: Sequence[int]) -> tuple[list[str], FinishReason | None]:
        """Append tokens up to the first that ends the request; the text each one released."""
        text = self._text.get(request)
        if text is None:
            prompt = request.token_ids[: request.prompt_len]
            text = Detokenizer(self._tokenizer, request.params.stop, prompt, request.params.visible_tokens)
            self._text[request] = text
        pieces: list[str] = []
        for token in tokens:
            if request.constraint is not None:
                request.constraint.advance(token)
            request.token_ids.append(token)
            checked = request.num_output >= request.params.min_tokens
            piece, stopped = text.push(token, check_stop=checked)
            pieces.append(piece)
            finish = FinishReason.STOP if stopped else self._finish_reason(request, token)
            if finish is not None:
                if not stopped:
                    pieces[-1] += text.flush(request.output_ids)
                return pieces, finish
        return pieces, None

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        params = request.params
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            return FinishReason.STOP
        if request.constraint is not None and request.constraint.finished:
            return FinishReason.STOP
        if request.num_output >= params.max_tokens or len(request.token_ids) >= self._max_model_len:
            return FinishReason.LENGTH
        return None

    def _compact(self, request: Request, root: int, path: Sequence[int], moves: tuple[list[int], list[int]]) -> None:
        """Accepted node number j must lie right behind the root, at index root + 1 + j."""
        if any(node != j for j, node in enumerate(path)):
            slots = slots_of(request.blocks, self._blocks.block_size, root + 1, root + 2 + path[-1])
            for j, node in enumerate(path):
                if node != j:
                    moves[0].append(int(slots[node]))
                    moves[1].append(int(slots[j]))

    def _publish(self, request: Request) -> None:
        self._blocks.shrink(request.blocks, max(len(request.token_ids), request.in_flight))
        self._blocks.publish(
            request.blocks, request.block_hashes, request.token_ids, request.num_computed, request.salt
        )

    def _count(self, request: Request, tree: DraftTree, path: Sequence[int], kept: int, now: float) -> None:
        stats = request.stats
        stats.target_forwards += 1
        if tree.drafter:
            _count_draft(stats, tree, path)
        if stats.first_token is None:
            stats.first_token, stats.first_count = now, kept
        stats.last_token = now

    def _logprobs(
        self, request: Request, walk: Walk, kept: int, row: int, scores: TargetScores
    ) -> tuple[TokenLogprobs, ...]:
        rows = [row, *(row + 1 + node for node in walk.path)]
        top = request.params.logprobs or 0
        return tuple(_logprob(scores, r, t, top) for r, t in zip(rows, walk.tokens[:kept], strict=False))

    def _keep_prompt_logprobs(self, item: ScheduledRequest, scores: TargetScores) -> None:
        """Collect the prompt's log-probabilities; the first token has none."""
        request = item.request
        if request.id not in scores.prompt_rows or request.num_output:
            return
        start, stop = scores.prompt_rows[request.id]
        found = self._prompt_logprobs.setdefault(request, [None])
        for i in range(stop - start):
            place = item.start + i + 1
            if place < request.prompt_len and place == len(found):
                top = request.params.prompt_logprobs or 0
                found.append(_logprob(scores, start + i, request.token_ids[place], top))


def _count_draft(stats: RequestStats, tree: DraftTree, path: Sequence[int]) -> None:
    stats.draft_tokens += len(tree)
    stats.longest_draft = max(stats.longest_draft, len(tree))
    stats.accepted_tokens += len(path)
    for counts, names in (
        (stats.drafted_by, tree.drafter),
        (stats.accepted_by, [tree.drafter[node] for node in path]),
        (stats.also_drafted_by, [name for _, name, _ in tree.shared]),
        (stats.also_accepted_by, [name for node, name, _ in tree.shared if node in path]),
    ):
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    stats.accepted_counts.extend([0] * (len(path) + 1 - len(stats.accepted_counts)))
    stats.accepted_counts[len(path)] += 1


def _logprob(scores: TargetScores, row: int, token: int, top: int) -> TokenLogprobs:
    (value,), best = token_logprobs(scores.host[row], [token], top)
    return TokenLogprobs(token, value, tuple(best))
