"""Improved multi-candidate decoding (2409.10644). Its verification is lossy as published and is measured here only to
show that; what is offered are trees from the draft under exact rules, and its decision model as a length policy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from paceline.bench.laws import Choices, LawOf, outcomes, sampled_tree
from paceline.bench.laws import Context as Tokens
from paceline.bench.systems.base import Row, above, at_least, at_most, suite
from paceline.bench.systems.chains import LONGEST, recorded
from paceline.bench.systems.chen import EXACT
from paceline.bench.systems.context import Context
from paceline.bench.systems.real_laws import law_error, real_laws
from paceline.bench.systems.specdec import trained
from paceline.engine.draft_tree import Origin
from paceline.plan.decision import DecisionStop
from paceline.plan.heads import DecisionHead
from paceline.train.acceptance_head import HeadSettings
from paceline.verify.coupled import CoupledRule


def _published(context: Context) -> Iterator[Row]:
    """The first token's law as published, at real contexts."""
    for width in (1, 2):
        errors = [_first_token_error(laws.p, laws.q, laws.vocab, width) for laws in real_laws(context)]
        note = f"largest of {len(errors)} contexts, median {np.median(errors):.3f}; one draft token after each"
        if width == 1:
            yield at_most("as published, one first token: error of its law", max(errors), EXACT, note)
        else:
            yield above("as published, two first tokens: lossy, error", max(errors), 1e-3, note + "; not offered")


def _first_token_error(p: LawOf, q: LawOf, vocab: int, width: int) -> float:
    """First tokens from the target without replacement, a draft token after each, and the longest path wins."""
    law = np.zeros(vocab)
    for probability, token in outcomes(lambda choices: published_first(p, q, vocab, width, choices)):
        law[token] += probability
    return float(np.abs(law - p(()).probabilities(vocab)).max())


def published_first(p: LawOf, q: LawOf, vocab: int, width: int, choices: Choices) -> int:
    """The first token that one round of the published form commits."""
    left = p(()).probabilities(vocab).copy()
    first, survives = list[int](), list[bool]()
    for _ in range(width):
        first.append(choices.pick(left / left.sum()))
        left[first[-1]] = 0.0
        path: Tokens = (first[-1],)
        target, draft = p(path).probabilities(vocab), q(path).probabilities(vocab)
        # Whether the draft's token passes, whichever it is: sum min(p, q).
        passes = float(np.minimum(target, draft).sum())
        survives.append(choices.pick([1.0 - passes, passes]) == 1)
    return first[survives.index(True)] if True in survives else first[0]


def _exact(context: Context) -> Iterator[Row]:
    """The form that is offered, by enumeration."""
    error, places = law_error(context, CoupledRule(), lambda q: sampled_tree(q, (2,), Origin.DISTINCT, 16))
    yield at_most("E1: two candidates from the draft under coupled", error, EXACT, f"{places} contexts, every outcome")


def _decision(context: Context) -> Iterator[Row]:
    """The decision model against the full length."""
    chains = recorded(context)
    head = trained(context, HeadSettings(kind="decision", rejection_weight=1.0, learning_rate=3e-3)).head
    assert isinstance(head, DecisionHead)
    lengths = chains.lengths(lambda: DecisionStop(head.eval(), 0.5))
    # The fixed length that has as much accepted, so that waste is compared at the same accepted length.
    whole = np.full(len(lengths), LONGEST)
    tau, full = 1.0 + chains.mean_accepted(lengths), 1.0 + chains.mean_accepted(whole)
    fixed = next(k for k in range(1, LONGEST + 1) if k == LONGEST or 1.0 + chains.mean_accepted(whole * 0 + k) >= tau)
    same = whole * 0 + fixed
    wasted, would = (float((ls - np.minimum(chains.accepted, ls)).sum()) for ls in (lengths, same))
    note = f"p = 0.5: {lengths.mean():.2f} drafted a step; fixed {fixed} has as much accepted; {len(lengths)} steps"
    yield at_least("less waste than the fixed length with as much accepted", 1.0 - wasted / would, 0.15, note)
    loss = 1.0 - tau / (1.0 + chains.mean_accepted(same))
    yield at_most("accepted length lost beside it", loss, 0.03, f"{tau:.3f}; {full:.3f} with {LONGEST} always drafted")


run = suite(_published, _exact, _decision)
