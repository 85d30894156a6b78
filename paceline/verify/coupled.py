"""`coupled`: the target draws its own sample with the position's noise; a child that equals it is accepted.

The committed token is a function of context, seed and position alone, never of the draft. So any tree, pruning,
re-ranking or early stop is exact, and the text is the same with speculation on or off. It is sample-then-match with
shared Gumbel noise: a drafter that draws with the same noise agrees often (Gumbel coupling). Only nodes on the walk
are sampled. At temperature 0 it is argmax-match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.race import race
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law
from paceline.engine.types import NO_LAW, Walk
from paceline.errors import PacelineError
from paceline.verify.base import ROOT, LawSource


class CoupledRule:
    """The default rule."""

    name = "coupled"
    branches: Origin | None = Origin.CHOSEN
    shares_noise = True

    def accept(self, tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int) -> Walk:
        """Walk from the root along the target's own samples while the tree holds them."""
        if not len(tree):
            return Walk((), (draw_target(law(ROOT, []), noise, position, vocab_size),))
        return _walk(
            tree, lambda node, tokens: draw_target(law(node, tokens), noise, position + len(tokens), vocab_size)
        )


def follow(tree: DraftTree, drawn: Sequence[int]) -> Walk:
    """The walk along samples that were drawn already, of the root and of every node.

    Raises:
        PacelineError: the logits of a node on the walk hold no finite value.
    """

    if len(drawn) == 1 and drawn[0] != NO_LAW:
        return Walk((), (drawn[0],))

    def sample(node: int, _: Sequence[int]) -> int:
        if drawn[node + 1] == NO_LAW:
            raise PacelineError("the model returned logits without a finite maximum.")
        return drawn[node + 1]

    return _walk(tree, sample)


def _walk(tree: DraftTree, sample: Callable[[int, Sequence[int]], int]) -> Walk:
    """From the root along the target's samples (of a node, given the tokens before it) while the tree holds them."""
    children = tree.children()
    node, path, tokens = ROOT, list[int](), list[int]()
    while True:
        token = sample(node, tokens)
        tokens.append(token)
        node = next((child for child in children[node + 1] if tree.tokens[child] == token), ROOT)
        if node == ROOT:
            return Walk(tuple(path), tuple(tokens))
        path.append(node)


_NO_NOISE = np.zeros(1, dtype=np.uint32)


def draw_target(law: Law, noise: Noise, position: int, vocab_size: int) -> int:
    """The target's own sample at `position`; a point mass needs no noise."""
    if len(law.logits) == 1:
        return law.draw(_NO_NOISE)
    if type(law) is Law and law.ids is None and type(noise) is Noise and law.logits.dtype == np.float32:
        return race(law.logits, noise, position, Stream.TARGET)
    return law.draw(noise.words(position, Stream.TARGET, vocab_size))
