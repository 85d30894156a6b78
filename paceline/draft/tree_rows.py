"""What a draft model says after the root and after every node of trees that anybody may have drafted.

Drafting needs rows only where a tree goes on, and may be left out; whoever needs all of them asks here. Requests that
find no room in the draft cache together take turns, at the price of reading their texts again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.draft.draft_model import DraftModel, Scratch, Wanted
from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import Request


def tree_rows(
    model: DraftModel, trees: Sequence[tuple[Request, DraftTree]]
) -> Iterator[tuple[Request, NDArray[np.float32]]]:
    """Raw logits of every request: its root's row, then one for each node.  # [1 + n, vocab]

    Args:
        model: none of its rounds may be open; every text with its nodes must be within its length.
        trees: by request.
    """
    waiting = list(trees)
    while waiting:
        opened, later = list[tuple[Scratch, DraftTree]](), list[tuple[Request, DraftTree]]()
        for request, tree in waiting:
            scratch = model.open(request, len(tree))
            if scratch is None:
                later.append((request, tree))
            else:
                opened.append((scratch, tree))
        if not opened:
            model.evict()
            (request, tree), *later = waiting
            alone = model.open(request, len(tree))
            assert alone is not None, "a draft cache holds at least one sequence"
            opened = [(alone, tree)]
        _score(model, opened)
        for scratch, tree in opened:
            assert scratch.root_row is not None, "it was scored"
            yield scratch.request, np.stack([scratch.root_row, *scratch.rows])
            model.close(scratch, range(len(tree)) if tree.is_chain() else ())
        waiting = later


def read_ahead(model: DraftModel, requests: Sequence[Request]) -> None:
    """Compute a part of texts whose prompts the target still reads, so that less is missing when it samples."""
    rounds = [scratch for request in requests if (scratch := model.open(request, 0)) is not None]
    model.catch_up(rounds)
    for scratch in rounds:
        model.close(scratch, ())


def _score(model: DraftModel, opened: Sequence[tuple[Scratch, DraftTree]]) -> None:
    """As many forwards as it takes to read what the cache lacks, and the trees with them."""
    tree_of = {id(scratch): tree for scratch, tree in opened}
    left = [scratch for scratch, _ in opened]
    while left:
        ready = model.catch_up(left)
        if ready:
            model.score([Wanted(scratch, _nodes(tree_of[id(scratch)])) for scratch in ready])
            left = [scratch for scratch in left if scratch.root_row is None]


def _nodes(tree: DraftTree) -> list[tuple[int, int]]:
    return list(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
