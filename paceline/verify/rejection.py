"""`rejection`: modified rejection sampling on a chain (Leviathan et al. 2211.17192, Chen et al. 2302.01318).

Draft token x is accepted with probability min(1, p(x)/q(x)); after a rejection the recovered token is drawn from the
residual norm((p - q)+), after full acceptance the bonus token from p. p and q are the laws after every sampling
option. A token that was chosen deterministically has q = a point mass, which is exact when its choice did not look at
the target's draw. Each position reads its own noise: one uniform to accept, one stream to recover.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from paceline.engine.draft_tree import DraftTree
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law
from paceline.engine.types import Walk
from paceline.errors import RuleViolation
from paceline.verify.base import ROOT, LawSource


class RejectionRule:
    """Accepts a few points more of a stochastic chain than `coupled`; the text depends on the draft."""

    name = "rejection"
    allows_trees = False
    shares_noise = False

    def accept(self, tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int) -> Walk:
        """Test the chain's tokens in order and end at the first rejection."""
        _check(tree)
        tokens: list[int] = []
        for node in range(len(tree)):
            target = law(node - 1 if node else ROOT, tokens)
            p = target.probabilities(vocab_size)
            x = int(tree.tokens[node])
            q = tree.laws[node].probabilities(vocab_size) if tree.laws else _point(x, vocab_size)
            here = position + node
            if accepts(p[x], q[x], noise.uniform(here, Stream.ACCEPT)):
                tokens.append(x)
                continue
            rest = replace(target, logits=_log(residual(p, q)), ids=None)  # a law of the target's kind
            recovered = rest.draw(noise.words(here, Stream.RESIDUAL, vocab_size))
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


def _check(tree: DraftTree) -> None:
    if not tree.is_chain():
        raise RuleViolation("rejection walks a chain, and this draft branches.", field="tree")
    if tree.sampled and (tree.laws is None or len(tree.laws) != len(tree)):
        raise RuleViolation("the draft claims to be sampled but carries no law per token.", field="laws")
    if tree.laws is not None:
        for token, law in zip(tree.tokens.tolist(), tree.laws, strict=True):
            if not _can_draw(law, token):
                raise RuleViolation(f"token {token} cannot have been drawn from its draft law.", field="laws")


def _can_draw(law: Law, token: int) -> bool:
    if law.ids is not None:
        return token in law.ids
    return token < len(law.logits) and bool(law.logits[token] > -np.inf)


def _point(token: int, vocab_size: int) -> NDArray[np.float64]:
    dense = np.zeros(vocab_size)
    dense[token] = 1.0
    return dense


def _log(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(probabilities))
