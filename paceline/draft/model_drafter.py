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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from paceline.arrays import BoolArray
from paceline.cache.block_manager import BlockManager
from paceline.draft.base import NOTHING, DraftContext, Proposal
from paceline.draft.draft_model import DraftModel, Wanted
from paceline.draft.growing import GrowingTree
from paceline.draft.guess import Guesser
from paceline.draft.reading import Reading
from paceline.draft.scored import Ranking, Scored
from paceline.draft.shapes.base import Child, TreeShape
from paceline.engine.constraint import Constraint
from paceline.engine.draft_progress import DraftProgress, KeepDrafting
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request
from paceline.engine.sampling import build_law
from paceline.engine.types import Observation, Tap
from paceline.model.runner import ModelRunner

logger = logging.getLogger(__name__)
MAX_TOKENS = 512
"""Of one step's catching up."""
_TOP = 10


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
        guess: guesses what the draft model will say.
        reading: what the draft model reads of a request; None: all of it.
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
        max_tokens: int = MAX_TOKENS,
        guess: Guesser | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.model = DraftModel(
            runner,
            blocks,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_tokens=max_tokens,
            reading=reading,
        )
        self.coupled = coupled
        self._shape = shape
        self._stop_ids = tuple(stop_ids)
        self._guesser = guess
        self.prior = shape.prior
        self.width = shape.width

    @property
    def hidden_size(self) -> int:
        """Of the draft model's last hidden states."""
        config: Any = self.model.runner.model.config
        return int(config.hidden_size)

    @property
    def blocks(self) -> BlockManager | None:
        """Of the draft model's cache."""
        return self.model.blocks

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """A tree per request; nothing where the draft cache has no room."""
        trees = [self._start(c) if c.budget > 0 and c.depth != 0 else None for c in contexts]
        started = [tree for tree in trees if tree is not None]
        ready = {id(scratch) for scratch in self.model.catch_up([tree.scratch for tree in started])}
        grown = [tree for tree in started if id(tree.scratch) in ready]
        self._make_room_for_guesses(grown)
        self._grow(grown)
        for tree in grown:
            self._add(tree, tree.growth.finish(len(tree.tokens)))
            nodes, fed = tree.first_path()
            self._learn(tree, nodes, fed)
            self.model.close(tree.scratch, fed)
        return [NOTHING if tree is None or not tree.tokens else self._proposal(tree) for tree in trees]

    def use(self, guess: Guesser | None) -> None:
        """Another guesser from now on."""
        self._guesser = guess

    def observe(self, observation: Observation) -> None:
        """Nothing to do: the next round compares its cache with the committed tokens."""

    def forget(self, request: Request) -> None:
        """Release the request's draft blocks."""
        self.model.forget(request)
        if self._guesser is not None:
            self._guesser.forget(request)

    def _start(self, context: DraftContext) -> GrowingTree | None:
        levels = context.budget if context.depth is None else min(context.budget, context.depth)
        scratch = self.model.open(context.request, context.budget)
        if scratch is None:
            return None
        growth = self._shape.start(context.budget, levels, context.acceptance)
        params = context.request.params
        options = replace(params, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) if params.greedy else params
        return GrowingTree(context, scratch, growth, levels, self._ranking(context.request), options)

    def _make_room_for_guesses(self, trees: Sequence[GrowingTree]) -> None:
        """When everyone has room for the draft itself, so that guessing takes nobody's."""
        for tree in trees if self._guesser is not None else ():
            guesses = self._guesser.most * (tree.levels - 1)  # type: ignore[union-attr]
            if self.model.make_room(tree.scratch, guesses):
                tree.guesses = guesses

    def _ranking(self, request: Request) -> Ranking:
        if request.params.greedy:
            return Ranking.PROBABILITY
        if self.coupled:
            return Ranking.TARGET_NOISE
        return Ranking.PROBABILITY if self._shape.origin is Origin.CHOSEN else Ranking.OWN_NOISE

    def _grow(self, trees: Sequence[GrowingTree]) -> None:
        """Level by level, until nobody wants children. A plan that is asked after every level sees all trees at the
        same one; otherwise trees run ahead as far as their nodes are scored."""
        active, depth = list(trees), 0
        keep = next((t.context.keep_drafting for t in trees), None)
        while active:
            depth += 1
            self._score(active, hidden=keep is not None and keep.wants_hidden)
            for tree in active:
                self._extend(tree)
                while keep is None and tree.pending and not tree.unscored():
                    self._extend(tree)
            active = [tree for tree in active if tree.pending]
            if keep is not None and active:
                going = keep.keep(self._progress(active, depth, keep))
                active = [tree for tree, goes in zip(active, going.tolist(), strict=True) if goes]

    def _score(self, trees: Sequence[GrowingTree], *, hidden: bool) -> None:
        """Make sure that every pending node has its row, in one forward at most."""
        wanted = [Wanted(tree.scratch, self._feed(tree, new)) for tree in trees if (new := tree.unscored())]
        if wanted:
            self.model.score(wanted, hidden=hidden)

    def _feed(self, tree: GrowingTree, new: Sequence[int]) -> list[tuple[int, int]]:
        """What goes through the model: new nodes of the tree, and guesses of what will come after them."""
        place, nodes = dict(tree.scratch.place), list[tuple[int, int]]()

        def put(parent: int, token: int) -> int:
            if (parent, token) not in place:
                place[parent, token] = len(tree.scratch.tokens) + len(nodes)
                nodes.append((parent, token))
            return place[parent, token]

        for node in new:
            if node >= 0:
                tree.fed[node] = put(tree.fed[tree.parents[node]], tree.tokens[node])
        drafted = len(nodes)
        left = drafted + (0 if self._guesser is None else min(tree.guesses, self._guesser.most))
        for i, node in enumerate(new):
            most = len(nodes) + (left - len(nodes)) // (len(new) - i)
            for chain in self._guess(tree, node, most - len(nodes)):
                at = tree.fed[node]
                for token in chain:
                    if len(nodes) == most and (at, token) not in place:
                        break
                    at = put(at, token)
        tree.guesses -= len(nodes) - drafted
        return nodes

    def _guess(self, tree: GrowingTree, node: int, most: int) -> Iterator[Sequence[int]]:
        """Guesses after a node, as deep as nodes of the tree will be scored."""
        path = tree.paths[node]
        depth = tree.levels - 1 - len(path)
        if self._guesser is None or most < 1 or depth < 1:
            return
        for chain in self._guesser.guess(tree.context.request, path, most, depth):
            known = next((i for i, token in enumerate(chain) if not 0 <= token < self.model.num_embeddings), len(chain))
            yield chain[: min(known, depth)]

    def _extend(self, tree: GrowingTree) -> None:
        """Ask the shape for the children of the pending nodes."""
        pending, tree.pending = tree.pending, []
        tree.scored = [s for s in (self._scored(tree, node) for node in pending) if s is not None]
        if tree.scored:
            self._add(tree, tree.growth.grow(tree.scored, len(tree.tokens)))

    def _scored(self, tree: GrowingTree, node: int) -> Scored | None:
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

    def _add(self, tree: GrowingTree, children: Sequence[Child]) -> None:
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

    def _progress(self, trees: Sequence[GrowingTree], depth: int, keep: KeepDrafting) -> DraftProgress:
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

    def _learn(self, tree: GrowingTree, nodes: Sequence[int], fed: Sequence[int]) -> None:
        """Show the guesser the first path of the tree, and what the model liked best along it."""
        if self._guesser is not None and tree.scratch.root_row is not None:
            likeliest = [int(tree.scratch.row(node).argmax()) for node in (-1, *fed)]
            self._guesser.learn(tree.context.request, [tree.tokens[node] for node in nodes], likeliest)

    def _proposal(self, tree: GrowingTree) -> Proposal:
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
