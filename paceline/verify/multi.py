"""`multi`: rejection sampling over siblings drawn with replacement (SpecInfer 2305.09781, MCSD 2401.06706).

Every child is tested against the same draft law; a rejection leaves norm((p - q)+) of the target's. Siblings may
repeat, which is why trees drawn without replacement do better. Chosen trees are walked as well: each child is a point
mass.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.rng import Noise
from paceline.engine.types import Walk
from paceline.verify.base import LawSource
from paceline.verify.claims import check_claims
from paceline.verify.multi_round import Dense, walk_tree


class MultiRule:
    """For trees whose siblings were drawn with replacement."""

    name = "multi"
    branches: Origin | None = Origin.INDEPENDENT
    shares_noise = False

    def accept(self, tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int) -> Walk:
        """Test siblings in their order."""
        check_claims(self.name, tree, self.branches)
        return walk_tree(tree, law, noise, position, vocab_size, same)


def same(q: Dense, _tried: Sequence[int]) -> Dense:
    """The law of the next sibling is that of the last."""
    return q
