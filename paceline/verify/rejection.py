"""`rejection`: modified rejection sampling on a chain (Leviathan et al. 2211.17192, Chen et al. 2302.01318).

Draft token x is accepted with probability min(1, p(x)/q(x)); after a rejection the recovered token is drawn from the
residual norm((p - q)+), after full acceptance the bonus token from p. p and q are the laws after every sampling
option. A token that was chosen deterministically has q = a point mass, which is exact when its choice did not look at
the target's draw. Each position reads its own noise: one uniform to accept, one stream to recover.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.rng import Noise, Stream
from paceline.engine.types import Walk
from paceline.verify.base import ROOT, LawSource
from paceline.verify.claims import check_claims


class RejectionRule:
    """Accepts a few points more of a stochastic chain than `coupled`; the text depends on the draft."""

    name = "rejection"
    branches: Origin | None = None
    shares_noise = False

    def accept(self, tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int) -> Walk:
        """Test the chain's tokens in order and end at the first rejection."""
        check_claims(self.name, tree, self.branches)
        tokens: list[int] = []
        for node in range(len(tree)):
            target = law(node - 1 if node else ROOT, tokens)
            p = target.probabilities(vocab_size)
            x = int(tree.tokens[node])
            q = tree.laws[node].probabilities(vocab_size) if tree.laws else point_mass(x, vocab_size)
            here = position + node
            if accepts(p[x], q[x], noise.uniform(here, Stream.ACCEPT)):
                tokens.append(x)
                continue
            recovered = target.having(residual(p, q)).draw(noise.words(here, Stream.RESIDUAL, vocab_size))
            return Walk(tuple(range(node)), (*tokens, recovered))
        bonus = law(len(tree) - 1, tokens).draw(noise.words(position + len(tree), Stream.TARGET, vocab_size))
        return Walk(tuple(range(len(tree))), (*tokens, bonus))


def accepts(p: float, q: float, uniform: float) -> bool:
    """Whether a token of target probability p and draft probability q passes."""
    return uniform * q < p


def residual(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """norm((p - q)+); p itself where p and q agree to the last bit, which leaves nothing.  # [vocab]"""
    excess = np.maximum(p - q, 0.0)
    total = excess.sum()
    return p if total == 0.0 else np.asarray(excess / total, dtype=np.float64)


def point_mass(token: int, vocab_size: int) -> NDArray[np.float64]:
    """The law of a token that was chosen.  # [vocab]"""
    dense = np.zeros(vocab_size)
    dense[token] = 1.0
    return dense
