"""Walking a tree with one rejection test per child: what `recursive` and `multi` have in common.

At a node the children are tested in order against what is left of the target's law. Child x with draft law q passes
with probability min(1, r(x)/q(x)); a rejection leaves r <- norm((r - q)+). The rules differ in q: drawn with
replacement it stays what it was, drawn without it loses the tokens tried before. A chosen child is a point mass. After
the last child the recovered token is drawn from r; a node without children gives a bonus token from the target's law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.engine.draft_tree import DraftTree
from paceline.engine.rng import Noise, Stream
from paceline.engine.types import Walk
from paceline.verify.base import ROOT, LawSource
from paceline.verify.rejection import accepts, point_mass, residual

Dense = NDArray[np.float64]
NextLaw = Callable[[Dense, Sequence[int]], Dense]
"""The draft law of the next sibling, from that of the last one and the tokens that the siblings before it drew."""


def walk_tree(tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int, next_law: NextLaw) -> Walk:
    """Descend from the root as far as children are accepted."""
    children = tree.children()
    node, path, tokens = ROOT, list[int](), list[int]()
    while True:
        here = position + len(tokens)
        target = law(node, tokens)
        kids = children[node + 1]
        if not kids:
            return Walk(tuple(path), (*tokens, target.draw(noise.words(here, Stream.TARGET, vocab_size))))
        left = target.probabilities(vocab_size)
        q = tree.laws[kids[0]].probabilities(vocab_size) if tree.laws else None
        for number, kid in enumerate(kids):
            x = int(tree.tokens[kid])
            draft = point_mass(x, vocab_size) if q is None else q
            if accepts(left[x], draft[x], noise.uniform(here, Stream.ACCEPT, number)):
                node = kid
                break
            left = residual(left, draft)
            q = None if q is None else next_law(q, tree.tokens[kids[: number + 1]].tolist())
        else:
            recovered = target.having(left).draw(noise.words(here, Stream.RESIDUAL, vocab_size))
            return Walk(tuple(path), (*tokens, recovered))
        path.append(node)
        tokens.append(int(tree.tokens[node]))
