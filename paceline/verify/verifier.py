"""The verify stage: one target forward over all committed tokens and draft nodes of the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.arrays import BoolArray
from paceline.engine.draft_tree import DraftTree
from paceline.engine.sampling import MIN_TEMPERATURE
from paceline.engine.types import (
    NOT_DRAWN,
    DraftBatch,
    ScheduledBatch,
    ScheduledRequest,
    TargetScores,
    TargetTransform,
)
from paceline.model.runner import ForwardBatch, ModelRunner, RowDraws, SequenceInput

_ROOT_ONLY = (0,)
_UNREAD = (0,)
"""Stands for a token that the device puts in."""


class Verifier:
    """Scores draft trees with the target.

    Args:
        runner: the target model.
        shares_noise: whether the acceptance rule commits the target's own samples, which the device may draw then.
        transform: declares another target, whose samples are drawn on the host.
    """

    def __init__(
        self, runner: ModelRunner, *, shares_noise: bool = False, transform: TargetTransform | None = None
    ) -> None:
        self._runner = runner
        self._shares_noise = shares_noise
        self._transform = transform

    def verify(self, batch: ScheduledBatch, drafts: DraftBatch) -> TargetScores:
        """Logits of every sampling request's root and nodes, and of prompt tokens where they were asked for."""
        trees = iter(drafts.trees)
        inputs: list[SequenceInput] = []
        rows: list[int] = []
        first_row: list[int] = []
        prompt_rows: dict[str, tuple[int, int]] = {}
        start = 0
        for item in batch.items:
            tree = next(trees) if item.samples else None
            inputs.append(_sequence_input(item, tree))
            end = start + item.num_tokens
            if item.request.params.prompt_logprobs is not None and item.start < item.request.prompt_len:
                prompt_rows[item.request.id] = (len(rows), len(rows) + item.num_tokens)
                rows.extend(range(start, end))
            if tree is not None:
                first_row.append(len(rows))
                rows.extend(range(end - 1, end + len(tree.tokens)))
            start += len(inputs[-1].token_ids)
        forward = ForwardBatch(tuple(inputs), rows)
        if self._transform is not None:
            scores = TargetScores(self._runner.forward(forward), tuple(first_row), prompt_rows)
            return self._transform.apply(batch, drafts, scores)
        if not self._runner.draws:
            return TargetScores(self._runner.forward(forward), tuple(first_row), prompt_rows)
        draws = self._draws(batch, drafts, first_row, len(rows))
        logits, samples = self._runner.launch(forward, draws)
        return TargetScores(
            logits,
            tuple(first_row),
            prompt_rows,
            read=lambda: np.where(draws.usable, samples(), NOT_DRAWN),
            all_drawn=bool(draws.usable.all()),
        )

    def _draws(self, batch: ScheduledBatch, drafts: DraftBatch, first_row: Sequence[int], num_rows: int) -> RowDraws:
        """The noise and temperature of every row that commits or verifies."""
        usable = [False] * num_rows
        temperature = [0.0] * num_rows
        seed, sample_index, position = [0] * num_rows, [0] * num_rows, [0] * num_rows
        for item, tree, row in zip(batch.sampling, drafts.trees, first_row, strict=True):
            request = item.request
            params = request.params
            if request.constraint is not None or not params.law_is_plain or not (params.greedy or self._shares_noise):
                continue
            depths = (0, *tree.depths().tolist()) if len(tree.tokens) else _ROOT_ONLY
            for r, depth in enumerate(depths, start=row):
                usable[r] = True
                if not params.greedy:
                    temperature[r] = max(params.temperature, MIN_TEMPERATURE)
                    seed[r], sample_index[r] = request.seed, request.sample_index
                    position[r] = item.start + item.num_tokens + depth
        words = (np.array(values, dtype=np.int64) for values in (sample_index, position))
        seeds = np.array(seed, dtype=np.uint64).view(np.int64)
        return RowDraws(np.array(usable), np.array(temperature), seeds, *words)


def _sequence_input(item: ScheduledRequest, tree: DraftTree | None) -> SequenceInput:
    request, start, stop = item.request, item.start, item.start + item.num_tokens
    positions = np.arange(start, stop)
    committed: Sequence[int] = request.token_ids[start:stop] if item.carried is None else _UNREAD
    carried = -1 if item.carried is None else item.carried
    if tree is None or not len(tree.tokens):
        return SequenceInput(committed, positions, start, request.blocks, carried=carried)
    return SequenceInput(
        [*committed, *tree.tokens.tolist()],
        np.concatenate([positions, stop - 1 + tree.depths()]),
        start,
        request.blocks,
        None if tree.is_chain() else _visible(item.num_tokens, tree),
        num_causal=item.num_tokens,
        carried=carried,
    )


def _visible(num_committed: int, tree: DraftTree) -> BoolArray:
    """Committed tokens see what is before them; a node sees all committed tokens and its own path.  # [n, n]"""
    n = num_committed + len(tree)
    visible = np.zeros((n, n), dtype=np.bool_)
    visible[:num_committed, :num_committed] = np.tri(num_committed, dtype=np.bool_)
    visible[num_committed:, :num_committed] = True
    visible[num_committed:, num_committed:] = tree.ancestor_mask()
    return visible
