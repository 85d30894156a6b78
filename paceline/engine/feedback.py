"""The two backward edges of a step: statistics for the next plan, observations for the drafters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from paceline.arrays import FloatArray
from paceline.engine.draft_tree import DraftTree
from paceline.engine.types import (
    AcceptedStep,
    DraftBatch,
    NodeLabels,
    Observation,
    ScheduledRequest,
    SpecPlan,
    StepStats,
    Walk,
)

TOP_IDS = 8
_NONE, _NO_CHANCES = np.empty(0, dtype=np.int64), np.empty(0)
_NO_LABELS = NodeLabels((), _NONE, _NONE, _NONE, _NONE, _NO_CHANCES, np.empty(0, dtype=np.bool_))


def step_stats(step: AcceptedStep, step_seconds: float, observe_seconds: Mapping[str, float]) -> StepStats:
    """What the next plan learns.

    Args:
        step: a committed step.
        step_seconds: its wall time.
        observe_seconds: what the drafters spent on learning from it.
    """
    rows = zip(step.batch.sampling, step.drafted.trees, step.acceptance.walks, strict=True)
    walked = [(i, item, tree, walk) for i, (item, tree, walk) in enumerate(rows) if walk is not None]
    asked = step.drafted.seconds
    gains, nodes = _gains(step.verified, asked) if asked else ({}, {})
    trees = [(i, tree, _from_root(item, walk)) for i, item, tree, walk in walked] if asked else []
    return StepStats(
        requests=tuple(item.request for _, item, _, _ in walked),
        num_prompt_tokens=step.batch.num_tokens - len(step.batch.sampling),
        num_context_tokens=sum(item.start + item.num_tokens for item in step.batch.items),
        num_sequences=len(step.batch.items),
        committed=np.array([len(walk.tokens) for _, _, _, walk in walked], dtype=np.int64),
        verified=np.array([len(step.verified.trees[i]) for i, _, _, _ in walked], dtype=np.int64),
        forward_seconds=step.forward_seconds,
        step_seconds=step_seconds,
        draft_seconds={name: seconds + observe_seconds.get(name, 0.0) for name, seconds in asked.items()},
        draft_depths=_depths(step.drafted),
        gains=gains,
        nodes=nodes,
        labels=node_labels(trees, step.plan.acceptance) if asked else _NO_LABELS,
        slot_price=slot_price(step),
        asked=_asked(step.plan, asked),
        ahead=step.batch.items[0].carried is not None,
    )


def slot_price(step: AcceptedStep) -> float | None:
    """What a draft node had to survive with to be verified; None where no price was put on nodes."""
    return step.verified.slot_price if step.plan.slot_price is None else step.plan.slot_price


def _asked(plan: SpecPlan, names: Iterable[str]) -> dict[str, int]:
    """Requests that each drafter could draft for, where it could not for all of them."""
    found = {}
    for name in names:
        limit = plan.limits.get(name)
        if isinstance(limit, np.ndarray):
            found[name] = int(np.count_nonzero(np.minimum(plan.budgets, limit)))
    return found


def _from_root(item: ScheduledRequest, walk: Walk) -> tuple[int, ...]:
    """The tokens that stand where the draft's do; a draft made before the root was known begins with it."""
    return walk.tokens if item.carried is None else (item.request.token_ids[item.start], *walk.tokens)


def node_labels(
    walked: Sequence[tuple[int, DraftTree, Sequence[int]]], acceptance: Mapping[str, FloatArray]
) -> NodeLabels:
    """Labels of all drafted nodes whose parent lies on the committed path, trimmed ones included.

    Args:
        walked: (row in the plan, drafted tree, committed tokens) of every request that committed.
        acceptance: the plan's estimates.  # [num_sampling, num_keys] each
    """
    if not any(len(tree) for _, tree, _ in walked):
        return _NO_LABELS
    names = tuple(acceptance)
    index = {name: i for i, name in enumerate(names)}
    rows = [
        (index[name], key, depth, request, row, hit)
        for request, (row, tree, committed) in enumerate(walked)
        for name, key, depth, hit in _tree_labels(tree, committed)
    ]
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    drafter, key, depth, request, row, hit = table.T
    predicted = np.empty(len(table))
    for name, i in index.items():
        mine = drafter == i
        predicted[mine] = acceptance[name][row[mine], key[mine]]
    return NodeLabels(names, drafter, key, depth, request, predicted, hit.astype(np.bool_))


def _tree_labels(tree: DraftTree, committed: Sequence[int]) -> Iterator[tuple[str, int, int, bool]]:
    """Drafter, key, depth and outcome of every labelled node.

    Siblings drawn independently may repeat a token: only the first of them is ever accepted.
    """
    if not len(tree):
        return
    on_path = {-1: 0}  # node -> number of committed tokens up to it
    deepest = 0
    labelled: dict[int, tuple[int, bool]] = {}
    rows = zip(tree.tokens.tolist(), tree.parents.tolist(), tree.key.tolist(), strict=True)
    for node, (token, parent, key) in enumerate(rows):
        depth = on_path.get(parent)
        if depth is None or depth >= len(committed):
            continue
        hit = token == committed[depth] and depth == deepest
        if hit:
            on_path[node] = deepest = depth + 1
        labelled[node] = (depth + 1, hit)
        yield tree.drafter[node], key, depth + 1, hit
    for node, name, key in tree.shared:
        if node in labelled:
            yield name, key, *labelled[node]


def observations(step: AcceptedStep, *, want_top_ids: bool) -> Iterator[Observation]:
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
                row_parents=np.concatenate([[-1], tree.parents + 1]).astype(np.int64),
            )


def _depths(drafts: DraftBatch) -> dict[str, int]:
    deepest: dict[str, int] = dict.fromkeys(drafts.seconds, 0)
    for tree in drafts.trees:
        if not len(tree):
            continue
        depths = tree.depths().tolist()
        for name, depth in zip(tree.drafter, depths, strict=True):
            deepest[name] = max(deepest.get(name, 0), depth)
        for node, name, _ in tree.shared:
            deepest[name] = max(deepest.get(name, 0), depths[node])
    return deepest


def _gains(verified: DraftBatch, asked: Iterable[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Total survival and number of each drafter's verified nodes."""
    gains: dict[str, float] = dict.fromkeys(asked, 0.0)
    nodes: dict[str, int] = dict.fromkeys(asked, 0)
    for tree in verified.trees:
        for name, survival in zip(tree.drafter, tree.survival.tolist(), strict=True):
            gains[name] += survival
            nodes[name] += 1
    return gains, nodes
