"""`recursive`: rejection sampling over siblings drawn without replacement (RSD 2402.14160, Sequoia 2402.12374).

After a rejection the tried token leaves the draft law, and what is left is renormalised (leaving that out is biased).
A draft law that has no token left goes on uniformly over the tokens not tried yet (Sequoia). Siblings must stand in
the order of their draws. Chosen trees are walked as well: each child is a point mass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.rng import Noise
from paceline.engine.types import Walk
from paceline.verify.base import LawSource
from paceline.verify.claims import check_claims
from paceline.verify.multi_round import Dense, walk_tree


class RecursiveRule:
    """For trees whose siblings were drawn without replacement."""

    name = "recursive"
    branches: Origin | None = Origin.DISTINCT
    shares_noise = False

    def accept(self, tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int) -> Walk:
        """Test siblings in the order of their draws."""
        check_claims(self.name, tree, self.branches)
        return walk_tree(tree, law, noise, position, vocab_size, without)


def without(q: Dense, tried: Sequence[int]) -> Dense:
    """The draft law after its last draw: without that token, or uniform over what is untried if nothing is left."""
    left = q.copy()
    left[tried[-1]] = 0.0
    total = left.sum()
    if total > 0.0:
        return np.asarray(left / total, dtype=np.float64)
    untried = np.ones(len(q))
    untried[list(tried)] = 0.0
    return np.asarray(untried / max(untried.sum(), 1.0), dtype=np.float64)
