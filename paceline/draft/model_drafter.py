"""A draft model (Leviathan et al. 2211.17192, Chen et al. 2302.01318): any causal LM with the target's tokenizer.

It runs on the same runner as the target. Trees grow level by level for all requests together, ragged: a request that
is done leaves the later forwards. The shape of the tree decides which nodes there are (`shapes/`); how many levels and
nodes is the plan's business, which is also asked after every level who goes on.

Of a request with a grammar it drafts under the grammar, and no further than the text can go.

Under `coupled` tokens are ranked by the draft law with the target's noise, which makes agreement likely; under other
rules they are drawn with noise of their own and carry their laws, or are chosen without any noise.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from paceline.arrays import BoolArray
from paceline.cache.block_manager import BlockManager
from paceline.config import SamplingParams
from paceline.draft.base import NOTHING, DraftContext, Proposal
from paceline.draft.draft_model import DraftModel, Scratch, Wanted
from paceline.draft.guess import Guesser
from paceline.draft.scored import Ranking, Scored
from paceline.draft.shapes.base import Child, Growth, TreeShape
from paceline.engine.constraint import Constraint
from paceline.engine.draft_progress import DraftProgress, KeepDrafting
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request
from paceline.engine.sampling import Law, build_law
from paceline.engine.types import Observation, Tap
from paceline.model.runner import ModelRunner

logger = logging.getLogger(__name__)
_TOP = 10


@dataclass(eq=False, slots=True)
class _Tree:
    """One request's draft in the making. Node -1 is the root."""

    context: DraftContext
    scratch: Scratch
    growth: Growth
    ranking: Ranking
    options: SamplingParams
    """The request's, but at temperature 0 those under which the likeliest tokens can be ranked."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)
    paths: dict[int, tuple[int, ...]] = field(default_factory=lambda: {-1: ()})
    fed: dict[int, int] = field(default_factory=lambda: {-1: -1})
    """Node -> fed node of the scratch."""
    survival: dict[int, float] = field(default_factory=lambda: {-1: 1.0})
    chain_survival: float = 1.0
    pending: list[int] = field(default_factory=lambda: [-1])
    """Nodes whose children are wanted."""
    scored: list[Scored] = field(default_factory=list)
    """Of the newest level."""

    @property
    def room(self) -> int:
        """Nodes that may still be added."""
        return self.context.budget - len(self.tokens)

    def unscored(self) -> list[int]:
        """Pending nodes that have to go through the model."""
        if self.scratch.root_row is None:
            return self.pending
        return [n for n in self.pending if n >= 0 and self._known(n) is None]

    def _known(self, node: int) -> int | None:
        """The fed node of a node, if it went through the model already."""
        if node not in self.fed:
            found = self.scratch.place.get((self.fed[self.parents[node]], self.tokens[node]))
            if found is None:
                return None
            self.fed[node] = found
        return self.fed[node]


class ModelDrafter:
    """Drafts with a second model.

    Args:
        runner: the draft model.
        blocks: its block manager.
        vocab_size: the target's.
        coupled: rank with the target's noise and carry no laws.
        shape: how trees grow.
        stop_ids: the target's end tokens, which `min_tokens` masks in both laws.
        max_model_len: longest sequence the draft model was made for; longer ones get no draft.
        max_tokens: most tokens of one step's catching up.
        guesser: guesses what the draft model will say.
    """

    name = "draft"
    taps: frozenset[Tap] = frozenset()
    cost_per_token = True

    def __init__(
        self,
        runner: ModelRunner,
        blocks: BlockManager,
        *,
        vocab_size: int,
        coupled: bool,
        shape: TreeShape,
        stop_ids: Sequence[int] = (),
        max_model_len: int = 1 << 30,
        max_tokens: int = 512,
        guesser: Guesser | None = None,
    ) -> None:
        self.model = DraftModel(
            runner, blocks, vocab_size=vocab_size, max_model_len=max_model_len, max_tokens=max_tokens
        )
        self._coupled = coupled
        self._shape = shape
        self._stop_ids = tuple(stop_ids)
        self._guesser = guesser
        self.prior = shape.prior
        self.width = shape.width

    @property
    def hidden_size(self) -> int:
        """Of the draft model's last hidden states."""
        config: Any = self.model.runner.model.config
        return int(config.hidden_size)

    @property
    def blocks(self) -> BlockManager:
        """Of the draft model's cache."""
        return self.model.blocks

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """A tree per request; nothing where the draft cache has no room."""
        trees = [self._start(c) if c.budget > 0 and c.depth != 0 else None for c in contexts]
        started = [tree for tree in trees if tree is not None]
        ready = {id(scratch) for scratch in self.model.catch_up([tree.scratch for tree in started])}
        grown = [tree for tree in started if id(tree.scratch) in ready]
        self._grow(grown)
        for tree in grown:
            self._add(tree, tree.growth.finish(len(tree.tokens)))
            self._learn(tree)
            self.model.close(tree.scratch)
        return [NOTHING if tree is None or not tree.tokens else self._proposal(tree) for tree in trees]

    def observe(self, observation: Observation) -> None:
        """Nothing to do: the next round compares its cache with the committed tokens."""

    def forget(self, request: Request) -> None:
        """Release the request's draft blocks."""
        self.model.forget(request)
        if self._guesser is not None:
            self._guesser.forget(request)

    def _start(self, context: DraftContext) -> _Tree | None:
        guessed = 0 if self._guesser is None else self._guesser.most
        levels = context.budget if context.depth is None else min(context.budget, context.depth)
        scratch = self.model.open(context.request, context.budget + guessed * levels)
        if scratch is None:
            return None
        growth = self._shape.start(context.budget, levels, context.acceptance)
        params = context.request.params
        options = replace(params, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) if params.greedy else params
        return _Tree(context, scratch, growth, self._ranking(context.request), options)

    def _ranking(self, request: Request) -> Ranking:
        if request.params.greedy:
            return Ranking.PROBABILITY
        if self._coupled:
            return Ranking.TARGET_NOISE
        return Ranking.PROBABILITY if self._shape.origin is Origin.CHOSEN else Ranking.OWN_NOISE

    def _grow(self, trees: Sequence[_Tree]) -> None:
        """Level by level, until nobody wants children."""
        active, depth = list(trees), 0
        keep = next((t.context.keep_drafting for t in trees), None)
        while active:
            depth += 1
            self._score(active, hidden=keep is not None and keep.wants_hidden)
            for tree in active:
                self._extend(tree)
            active = [tree for tree in active if tree.pending]
            if keep is not None and active:
                going = keep.keep(self._progress(active, depth, keep))
                active = [tree for tree, goes in zip(active, going.tolist(), strict=True) if goes]

    def _score(self, trees: Sequence[_Tree], *, hidden: bool) -> None:
        """Make sure that every pending node has its row, in one forward at most."""
        wanted = [Wanted(tree.scratch, self._feed(tree)) for tree in trees if tree.unscored()]
        if wanted:
            self.model.score(wanted, hidden=hidden)

    def _feed(self, tree: _Tree) -> list[tuple[int, int]]:
        """The pending nodes that are not scored, and guesses of what will come after them."""
        scratch, nodes = tree.scratch, list[tuple[int, int]]()
        place = dict(scratch.place)

        def put(parent: int, token: int) -> int:
            found = place.get((parent, token))
            if found is None:
                found = place[parent, token] = len(scratch.tokens) + len(nodes)
                nodes.append((parent, token))
            return found

        for node in tree.unscored():
            if node >= 0:
                tree.fed[node] = put(tree.fed[tree.parents[node]], tree.tokens[node])
        for node in tree.unscored()[:1] if self._guesser is not None else ():
            for chain in self._guesser.guess(tree.context.request, tree.paths[node]):  # type: ignore[union-attr]
                at = tree.fed[node]
                for token in chain:
                    at = put(at, token)
        return nodes

    def _extend(self, tree: _Tree) -> None:
        """Ask the shape for the children of the pending nodes."""
        pending, tree.pending = tree.pending, []
        tree.scored = [s for s in (self._scored(tree, node) for node in pending) if s is not None]
        if tree.scored:
            self._add(tree, tree.growth.grow(tree.scored, len(tree.tokens)))

    def _scored(self, tree: _Tree, node: int) -> Scored | None:
        """What the model says after a node; None where there is nothing to say, which is known before any draw."""
        request, path = tree.context.request, tree.paths[node]
        row = tree.scratch.row(tree.fed[node])
        allowed = None
        if request.constraint is not None:
            allowed = _allowed(request.constraint, path)
            if allowed is None or not (row[allowed] > -np.inf).any():
                return None
        params = request.params
        output = [*request.output_ids, *path] if params.edits_logits else path
        masked = (*self._stop_ids, *params.stop_token_ids)
        prompt = request.token_ids[: request.prompt_len] if params.edits_logits else ()
        law = build_law(row, tree.options, prompt, output, masked, allowed)
        return Scored(node, len(path), row, law, tree.ranking, request, self.model.vocab_size)

    def _add(self, tree: _Tree, children: Sequence[Child]) -> None:
        by_node = {scored.node: scored for scored in tree.scored}
        acceptance = tree.context.acceptance
        for child in children[: tree.room]:
            node = len(tree.tokens)
            tree.tokens.append(child.token)
            tree.parents.append(child.parent)
            tree.keys.append(child.key)
            tree.paths[node] = (*tree.paths[child.parent], child.token)
            expected = self.prior[child.key] if acceptance is None else acceptance[child.key]
            tree.survival[node] = tree.survival[child.parent] * float(expected)
            if tree.ranking is Ranking.OWN_NOISE:
                tree.laws.append(by_node[child.parent].law)
            if child.expand:
                tree.pending.append(node)
        if not tree.room:
            tree.pending.clear()

    def _progress(self, trees: Sequence[_Tree], depth: int, keep: KeepDrafting) -> DraftProgress:
        newest = [tree.scored[0] for tree in trees]
        for tree, scored in zip(trees, newest, strict=True):
            tree.chain_survival *= scored.confidence
        hidden = None
        if keep.wants_hidden:
            hidden = torch.stack([t.scratch.hidden[t.fed[s.node]] for t, s in zip(trees, newest, strict=True)])
        top = np.stack([s.top_probabilities(_TOP) for s in newest]) if keep.wants_top_probabilities else None
        return DraftProgress(
            depth=depth,
            rows=np.array([tree.context.row for tree in trees], dtype=np.int64),
            nodes=np.array([len(tree.tokens) for tree in trees], dtype=np.int64),
            survival=np.array([sum(tree.survival[n] for n in tree.pending) for tree in trees]),
            chain_survival=np.array([tree.chain_survival for tree in trees]),
            entropy=np.array([max(s.entropy for s in tree.scored) for tree in trees]),
            confidence=np.array([scored.confidence for scored in newest]),
            hidden=hidden,
            top_probabilities=top,
        )

    def _learn(self, tree: _Tree) -> None:
        """Show the guesser the first path of the tree, and what the model liked best along it."""
        if self._guesser is None:
            return
        node, path, likeliest = -1, list[int](), list[int]()
        while node in tree.fed and tree.fed[node] < len(tree.scratch.rows) and tree.scratch.root_row is not None:
            likeliest.append(int(tree.scratch.row(tree.fed[node]).argmax()))
            child = next((n for n, parent in enumerate(tree.parents) if parent == node), None)
            if child is None:
                break
            path.append(tree.tokens[child])
            node = child
        self._guesser.learn(tree.context.request, path, likeliest)

    def _proposal(self, tree: _Tree) -> Proposal:
        drawn = tree.ranking is Ranking.OWN_NOISE
        return Proposal(
            np.array(tree.tokens, dtype=np.int64),
            np.array(tree.parents, dtype=np.int64),
            np.array(tree.keys, dtype=np.int64),
            tuple(tree.laws) if drawn else None,
            self._shape.origin if drawn else Origin.CHOSEN,
        )


def _allowed(constraint: Constraint, path: Sequence[int]) -> BoolArray | None:
    """The grammar's mask; None behind the end, and where the grammar fails (acceptance reports it).  # [vocab]"""
    try:
        return constraint.allowed(path)
    except Exception:
        logger.exception("a grammar failed; its request gets no draft")
        return None
