"""The real draft-model drafter over made-up rows, so that trees can be drawn by the thousand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from paceline import SamplingParams
from paceline.draft.base import DraftContext, Proposal
from paceline.draft.draft_model import CachedSequence, Scratch, Wanted
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.shapes.registry import create_shape, parse_tree
from paceline.engine.constraint import Constraint
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request

RowOf = Callable[[tuple[int, ...]], np.ndarray]
PROMPT = [0, 1]


class RowModel:
    """A draft model whose logits are a function of the path below the root; counts its forwards."""

    def __init__(self, row_of: RowOf, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.forwards = 0
        self._row_of = row_of
        self._paths: dict[int, list[tuple[int, ...]]] = {}

    def open(self, request: Request, nodes: int) -> Scratch:
        scratch = Scratch(request, request.token_ids, CachedSequence(), nodes)
        self._paths[id(scratch)] = []
        return scratch

    def catch_up(self, rounds: Sequence[Scratch]) -> list[Scratch]:
        return list(rounds)

    def score(self, wanted: Sequence[Wanted], *, hidden: bool = False) -> None:  # noqa: ARG002
        self.forwards += 1
        for want in wanted:
            scratch, paths = want.scratch, self._paths[id(want.scratch)]
            if scratch.root_row is None:
                scratch.root_row = self._row_of(())
            for parent, token in want.nodes:
                scratch.place[parent, token] = len(scratch.tokens)
                scratch.tokens.append(token)
                scratch.parents.append(parent)
                paths.append((*(paths[parent] if parent >= 0 else ()), token))
                scratch.rows.append(self._row_of(paths[-1]))

    def make_room(self, scratch: Scratch, nodes: int) -> bool:  # noqa: ARG002
        return True

    def close(self, scratch: Scratch, path: Sequence[int]) -> None:  # noqa: ARG002
        del self._paths[id(scratch)]


def random_rows(seed: int, vocab: int, spread: float = 1.5) -> RowOf:
    """A row for every path."""
    known: dict[tuple[int, ...], np.ndarray] = {}

    def row_of(path: tuple[int, ...]) -> np.ndarray:
        if path not in known:
            known[path] = np.random.default_rng([seed, vocab, *path]).normal(0, spread, vocab).astype(np.float32)
        return known[path]

    return row_of


def tree_drafter(tree: str, origin: Origin | None, row_of: RowOf, vocab: int) -> ModelDrafter:
    """A drafter of that shape. Origin None: the rule `coupled`."""
    shape = create_shape(parse_tree(tree), origin or Origin.CHOSEN)
    network = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(num_embeddings=vocab))
    runner: Any = SimpleNamespace(model=network)
    blocks: Any = None  # the cache, which nothing asks for here
    made = ModelDrafter(runner, blocks, vocab_size=vocab, coupled=origin is None, shape=shape)
    model: Any = RowModel(row_of, vocab)
    made.model = model
    return made


def request_of(seed: int = 0, constraint: Constraint | None = None, **options: Any) -> Request:
    """A request at the root of everything."""
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": 64, **options})
    return Request("shape", list(PROMPT), len(PROMPT), params, seed, constraint=constraint)


def propose(
    drafter: ModelDrafter, request: Request, budget: int, depth: int | None = None, acceptance: Any = None
) -> Proposal:
    """One tree."""
    return drafter.propose([DraftContext(request, budget, 0, depth, acceptance)])[0]


def paths_of(proposal: Proposal) -> list[tuple[int, ...]]:
    """The tokens from the root to every node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def siblings_of(proposal: Proposal) -> dict[int, list[int]]:
    """Nodes by parent."""
    found: dict[int, list[int]] = {}
    for node, parent in enumerate(proposal.parents.tolist()):
        found.setdefault(parent, []).append(node)
    return found
