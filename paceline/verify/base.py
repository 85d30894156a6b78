"""The acceptance rule protocol. Rules are pure: a tree, the target's laws and noise in, a walk out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.rng import Noise
from paceline.engine.sampling import Law
from paceline.engine.types import Walk

ROOT = -1


class LawSource(Protocol):
    """The target's law after a node, all sampling options applied with the node's own path as history."""

    def __call__(self, node: int, path: Sequence[int]) -> Law:
        """Law of the token after `node` (`ROOT` for the root); `path` holds the tokens from the root to it."""
        ...


class AcceptanceRule(Protocol):
    """Walks one draft tree so that the committed tokens have exactly the target's distribution."""

    name: str
    branches: Origin | None
    """How siblings may have been drawn (chosen ones are allowed as well); None: no node has more than one child."""
    shares_noise: bool
    """Whether drafters draw with the target's noise (and then carry no laws)."""

    def accept(self, tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int) -> Walk:
        """Decide what is committed.

        Args:
            tree: the verified draft; may be empty.
            law: the target's laws.
            noise: the request's noise.
            position: absolute position of the first token to commit.
            vocab_size: tokens in the vocabulary.

        Raises:
            RuleViolation: the tree has a shape or makes a claim under which the rule would be biased.
        """
        ...
