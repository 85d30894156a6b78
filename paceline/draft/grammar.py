"""Drafts what a request's grammar dictates (jump-forward decoding, SGLang 2312.07104), as a draft like any other.

Where the grammar allows a single token, that token is certain: its class has acceptance 1. Where it allows several but
all of them spell the same text, that text is drafted in the tokenizer's own words; the model may spell it otherwise,
so those classes are measured: the first token of the text, those between, and the last, which the model may well join
with what follows. Verifying instead of committing outright keeps the output's law and gives the KV in the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap

logger = logging.getLogger(__name__)
FORCED, FIRST, INNER, LAST = range(4)


class GrammarDrafter:
    """Drafts from each request's own grammar; proposes nothing for requests without one. It keeps no state."""

    name = "grammar"
    taps: frozenset[Tap] = frozenset()
    cost_per_token = False
    blocks = None

    def __init__(self) -> None:
        self.prior = np.array([1.0, 0.8, 0.9, 0.6])

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """The text that must come next, as a chain."""
        return [_propose(c) if c.request.constraint is not None and c.budget > 0 else NOTHING for c in contexts]

    def observe(self, observation: Observation) -> None:
        """Nothing to learn: the constraint moves by itself."""

    def forget(self, request: Request) -> None:
        """Nothing to drop."""


def _propose(context: DraftContext) -> Proposal:
    constraint = context.request.constraint
    assert constraint is not None, "checked above"
    try:
        jump = constraint.jump(context.budget)
    except Exception:
        logger.exception("the grammar of request %s failed; it gets no draft", context.request.id)
        return NOTHING
    spelt = len(jump.tokens) - jump.forced
    keys = [FORCED] * jump.forced + ([FIRST, *[INNER] * (spelt - 2), LAST] if spelt > 1 else [FIRST] * spelt)
    return chain(jump.tokens, keys) if jump.tokens else NOTHING
