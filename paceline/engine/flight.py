"""Steps that were launched and not read."""

from __future__ import annotations

from dataclasses import replace

from paceline.engine.types import DraftBatch, InFlight, ScheduledBatch


def reads_samples_only(step: InFlight) -> bool:
    """Whether the step is collected without its logits, and each of its requests gets exactly one token."""
    wishes = [item.request.params for item in step.batch.items]
    return (
        step.scores.all_drawn
        and step.verified.num_nodes == 0
        and not step.scores.prompt_rows
        and all(params.logprobs is None for params in wishes)
    )


def without_logits(step: InFlight) -> InFlight:
    """The step when the next one has been launched, which overwrites its logits."""
    return replace(step, scores=replace(step.scores, logits=step.scores.logits[:0]))


def without_finished(step: InFlight) -> InFlight | None:
    """A step of decoding requests without those that have ended; None if all have."""
    live = [i for i, item in enumerate(step.batch.items) if not item.request.finished]
    if len(live) == len(step.batch.items):
        return step
    if not live:
        return None
    return replace(
        step,
        batch=ScheduledBatch(tuple(step.batch.items[i] for i in live)),
        drafted=DraftBatch(tuple(step.drafted.trees[i] for i in live)),
        verified=DraftBatch(tuple(step.verified.trees[i] for i in live)),
        scores=replace(step.scores, first_row=tuple(step.scores.first_row[i] for i in live)),
    )
