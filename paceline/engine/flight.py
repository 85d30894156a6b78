"""Steps that were launched and not read, and what may be launched behind them.

The root of a request in a step behind another is a sample that only the device knows. Drafts are made of the tokens
before it: the first draft token guesses that sample, and what hangs from it is verified. If no guess of a step was
right, each of its requests gets one token, as if nobody had looked ahead. Which nodes are dropped is decided by the
tokens before them, so nothing of this touches the law of a sample.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from paceline.arrays import IntArray
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree
from paceline.engine.types import DraftBatch, InFlight, ScheduledBatch, SpecPlan


def reads_samples_only(step: InFlight) -> bool:
    """Whether the step is collected without its logits, and each of its requests gets exactly one token."""
    wishes = [item.request.params for item in step.batch.items]
    return (
        step.scores.all_drawn
        and not step.walks
        and not step.scores.prompt_rows
        and all(params.logprobs is None for params in wishes)
    )


def drop_logits(step: InFlight) -> None:
    """The next step has been launched, which overwrites this one's logits."""
    step.scores = replace(step.scores, logits=step.scores.logits[:0])


def all_ended(batch: ScheduledBatch) -> bool:
    """Whether nobody waits for the step any more."""
    return all(item.request.finished for item in batch.items)


def hold_blocks(step: InFlight, ahead: InFlight | None) -> None:
    """Say what the step behind this one needs when this one is committed."""
    for item in step.batch.items:
        item.request.in_flight = 0
    for item, tree in zip(ahead.batch.items, ahead.verified.trees, strict=True) if ahead is not None else ():
        item.request.in_flight = item.start + item.num_tokens + len(tree.tokens)


def room_of(batch: ScheduledBatch, max_model_len: int) -> IntArray:
    """The longest path of draft tokens that each request has room for, behind the tokens that are known.

    # [num_sampling]
    """
    left = [
        min(r.params.max_tokens - r.num_output, max_model_len - len(r.token_ids)) - 1
        for r in (item.request for item in batch.sampling)
    ]
    return np.maximum(np.array(left, dtype=np.int64), 0)


def room_for_guesses(plan: SpecPlan, batch: ScheduledBatch, max_model_len: int) -> SpecPlan:
    """The plan for drafters whose first token guesses the root: one node more, where there is room for it."""
    return replace(
        plan,
        budgets=np.minimum(np.where(plan.budgets > 0, plan.budgets + 1, 0), room_of(batch, max_model_len)),
        limits={name: _one_more(most) for name, most in plan.limits.items()},
    )


def _one_more(most: int | IntArray) -> int | IntArray:
    """A limit for those who have one."""
    return most + (np.asarray(most) > 0)


def guess_roots(drafts: DraftBatch) -> tuple[tuple[int | None, ...], DraftBatch]:
    """For roots that are not known: what they are believed to be, and the trees that hang from them."""
    guesses, trees = zip(*map(_guess, drafts.trees), strict=True)
    return guesses, DraftBatch(trees, drafts.seconds, drafts.slot_price)


def _guess(tree: DraftTree) -> tuple[int | None, DraftTree]:
    if not len(tree.tokens):
        return None, EMPTY_TREE
    node = max((i for i, parent in enumerate(tree.parents.tolist()) if parent < 0), key=tree.survival.item)
    below = tree.below(node)
    return (int(tree.tokens[node]) if len(below) else None), below


def learn_roots(step: InFlight, waited: float, started: float) -> None:
    """The step before this one was collected.

    Args:
        step: launched behind it.
        waited: seconds that the host waited for the device meanwhile; that much of drafting cost nothing.
        started: when the step before it ended.
    """
    if spent := sum(step.drafted.seconds.values()):
        left = max(1.0 - waited / spent, 0.0)
        seconds = {name: left * seconds for name, seconds in step.drafted.seconds.items()}
        step.drafted = replace(step.drafted, seconds=seconds)
    right = any(
        guess is not None and not item.request.finished and item.request.token_ids[item.start] == guess
        for item, guess in zip(step.batch.items, step.guesses, strict=False)
    )
    step.started, step.wrong = started, not right
