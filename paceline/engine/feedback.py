"""The two backward edges of a step: statistics for the next plan, observations for the drafters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paceline.engine.draft_tree import DraftTree
from paceline.engine.types import DraftBatch, InFlight, NodeLabel, Observation, StepStats

TOP_IDS = 8


def step_stats(step: InFlight, step_seconds: float) -> StepStats:
    """What the next plan learns."""
    rows = zip(step.batch.sampling, step.drafted.trees, step.acceptance.walks, strict=True)
    walks = [(item.request.salt, tree, walk) for item, tree, walk in rows if walk is not None]
    return StepStats(
        num_tokens=step.batch.num_tokens,
        num_draft_nodes=step.verified.num_nodes,
        num_committed=sum(len(walk.tokens) for _, _, walk in walks),
        num_sampling=len(step.batch.sampling),
        forward_seconds=step.forward_seconds,
        step_seconds=step_seconds,
        draft_seconds=step.drafted.seconds,
        draft_depths=_depths(step.drafted),
        labels=[label for salt, tree, walk in walks for label in node_labels(tree, walk.tokens, salt)],
    )


def node_labels(tree: DraftTree, committed: Sequence[int], salt: str = "") -> Iterator[NodeLabel]:
    """Labels of all drafted nodes whose parent lies on the committed path, trimmed ones included."""
    if not len(tree):
        return
    on_path = {-1: 0}  # node -> number of committed tokens up to it
    labelled: dict[int, bool] = {}
    rows = zip(tree.tokens.tolist(), tree.parents.tolist(), tree.key.tolist(), strict=True)
    for node, (token, parent, key) in enumerate(rows):
        depth = on_path.get(parent)
        if depth is None or depth >= len(committed):
            continue
        hit = token == committed[depth]
        if hit:
            on_path[node] = depth + 1
        labelled[node] = hit
        yield NodeLabel(tree.drafter[node], key, hit, salt)
    for node, name, key in tree.shared:
        if node in labelled:
            yield NodeLabel(name, key, labelled[node], salt)


def observations(step: InFlight, *, want_top_ids: bool) -> Iterator[Observation]:
    """One observation per request that committed tokens."""
    scores = step.scores
    top = scores.top_ids(0, len(scores.logits), TOP_IDS) if want_top_ids and len(scores.logits) else None
    rows = zip(step.batch.sampling, step.verified.trees, step.acceptance.walks, scores.first_row, strict=True)
    for item, tree, walk, row in rows:
        if walk is not None:
            root = item.request.token_ids[item.start + item.num_tokens - 1]
            yield Observation(
                request=item.request,
                committed=walk.tokens,
                row_tokens=np.concatenate([[root], tree.tokens]).astype(np.int64),
                top_ids=None if top is None else top[row : row + 1 + len(tree)],
            )


def _depths(drafts: DraftBatch) -> dict[str, int]:
    deepest: dict[str, int] = dict.fromkeys(drafts.seconds, 0)
    for tree in drafts.trees:
        depths = tree.depths().tolist()
        for name, depth in zip(tree.drafter, depths, strict=True):
            deepest[name] = max(deepest.get(name, 0), depth)
        for node, name, _ in tree.shared:
            deepest[name] = max(deepest.get(name, 0), depths[node])
    return deepest
