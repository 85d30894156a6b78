"""The accept stage: apply the rule to every request, one at a time, so that a failure stays with its request."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import Request
from paceline.engine.sampling import Law, build_law
from paceline.engine.types import NOT_DRAWN, Acceptance, DraftBatch, ScheduledBatch, TargetScores, Walk
from paceline.verify.base import AcceptanceRule
from paceline.verify.coupled import CoupledRule, follow

logger = logging.getLogger(__name__)
_ARGMAX_MATCH = CoupledRule()


def accept(
    rule: AcceptanceRule,
    batch: ScheduledBatch,
    drafts: DraftBatch,
    scores: TargetScores,
    stop_ids: Sequence[int],
) -> Acceptance:
    """Walks of all sampling requests that have not ended.

    Args:
        rule: how trees are walked; at temperature 0 every rule is argmax-match.
        batch: the step's requests.
        drafts: their verified trees.
        scores: the target's logits.
        stop_ids: the model's end tokens, which `min_tokens` masks.
    """
    walks: list[Walk | None] = []
    errors: dict[str, Exception] = {}
    drawn = None if scores.drawn is None else scores.drawn.tolist()
    for item, tree, row in zip(batch.sampling, drafts.trees, scores.first_row, strict=True):
        if item.request.finished:  # meanwhile
            walks.append(None)
            continue
        try:
            if drawn is None or drawn[row] == NOT_DRAWN:
                walks.append(_accept_one(rule, item.request, tree, scores, row, stop_ids))
            else:
                walks.append(follow(tree, drawn[row : row + 1 + len(tree.tokens)]))
        except Exception as error:
            logger.exception("request %s failed in acceptance", item.request.id)
            errors[item.request.id] = error
            walks.append(None)
    return Acceptance(tuple(walks), errors)


def _accept_one(
    rule: AcceptanceRule,
    request: Request,
    tree: DraftTree,
    scores: TargetScores,
    first_row: int,
    stop_ids: Sequence[int],
) -> Walk:
    params = request.params
    if request.id in scores.errors:
        raise scores.errors[request.id]
    output = request.output_ids if params.edits_logits else []
    prompt = request.token_ids[: request.prompt_len] if params.edits_logits else []
    masked = (*stop_ids, *params.stop_token_ids)
    constraint = request.constraint

    def law(node: int, path: Sequence[int]) -> Law:
        row = first_row + 1 + node
        allowed = None if constraint is None else constraint.allowed(path)
        if params.greedy and not params.edits_logits and scores.finite[row]:
            best = int(scores.argmax[row])
            if allowed is None or allowed[best]:
                return Law.point(best)
        return build_law(scores.host[row], params, prompt, [*output, *path], masked, allowed)

    chosen = _ARGMAX_MATCH if params.greedy else rule
    # A rule whose outcome depends on the draft must not reuse noise that made the draft.
    noise = request.noise if chosen.shares_noise else request.secret_noise
    return chosen.accept(tree, law, noise, len(request.token_ids), scores.logits.shape[-1])
