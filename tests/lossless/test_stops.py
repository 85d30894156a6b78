"""E1 for stops: what a policy answers after a draft forward leaves the committed law alone (error below 1e-12).

The real stops of all policies are asked, with what a draft model would tell them of a tiny scripted law: things known
before the newest token was drawn, and tokens that are kept. The same checker catches a stop that drops the token which
made it stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_head
from lossless.test_enumeration import BROKEN, EXACT

from paceline.bench.laws import Context, Draft, LawOf, ScriptedNoise, error_of, outcomes, random_laws, sampled_chain
from paceline.config import SamplingParams
from paceline.draft.base import NOTHING, Proposal
from paceline.engine.draft_progress import DraftProgress, KeepDrafting
from paceline.engine.draft_tree import Origin
from paceline.engine.rng import Stream
from paceline.engine.sampling import Law
from paceline.plan.decision import DecisionStop
from paceline.plan.draft_levels import PricedStop
from paceline.plan.heads import AcceptanceHead, DecisionHead
from paceline.plan.specdec import AcceptanceStop
from paceline.plan.svip import EntropyStop
from paceline.verify.base import AcceptanceRule
from paceline.verify.coupled import CoupledRule
from paceline.verify.multi import MultiRule
from paceline.verify.recursive import RecursiveRule
from paceline.verify.rejection import RejectionRule

VOCAB, LEVELS, HIDDEN = 3, 4, 4
P, Q = random_laws(40, VOCAB, SamplingParams()), random_laws(49, VOCAB, SamplingParams())


def acceptance_stop() -> KeepDrafting:
    head = make_head("specdec++", HIDDEN)
    assert isinstance(head, AcceptanceHead)
    return AcceptanceStop(head, 0.6, 1)


def decision_stop() -> KeepDrafting:
    head = make_head("decision")
    assert isinstance(head, DecisionHead)
    for parameter in head.layers[2].parameters():
        parameter.data.neg_()  # so that it goes on after the empty context, and not everywhere
    return DecisionStop(head, 0.5)


def priced_stop() -> KeepDrafting:
    chances = np.full((1, 9), 0.7)
    return PricedStop(np.linspace(1.0, 1.9, 10), 1.0, chances, 0.12, 0.1, 1.0, 1)


STOPS: dict[str, Callable[[], KeepDrafting]] = {
    "svip": lambda: EntropyStop(0.35, 0.15),
    "specdec++": acceptance_stop,
    "decision": decision_stop,
    "auto": priced_stop,
}


def hidden_of(context: Context) -> torch.Tensor:
    """A state that depends on every token of the context."""
    return torch.from_numpy(np.random.default_rng([7, *context]).normal(0.0, 2.0, HIDDEN)).float()


def progress_of(levels: Sequence[Sequence[Law]], path: Context, nodes: int) -> DraftProgress:
    """What a draft model would say after its newest level, of laws that were drawn from, the likeliest first.

    Args:
        levels: the laws of every level so far.
        path: committed tokens and the first node of each level but the newest.
        nodes: drafted so far.
    """
    best = [laws[0].probabilities(VOCAB) for laws in levels]
    newest = [law.probabilities(VOCAB) for law in levels[-1]]
    chain = float(np.prod([q.max() for q in best]))
    return DraftProgress(
        depth=len(levels),
        rows=np.array([0]),
        nodes=np.array([nodes]),
        survival=np.array([chain]),
        chain_survival=np.array([chain]),
        entropy=np.array([max(float(-(q[q > 0] * np.log(q[q > 0])).sum()) for q in newest)]),
        confidence=best[-1].max(keepdims=True),
        hidden=hidden_of(path)[None],
        top_probabilities=np.pad(np.sort(best[-1])[::-1], (0, 10 - VOCAB))[None],
    )


def stopped_tree(q: LawOf, make: Callable[[], KeepDrafting], widths: Sequence[int], origin: Origin) -> Draft:
    """Levels drawn from q until the stop says no."""

    def draft(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
        stop = make()
        tokens, parents, laws = list[int](), list[int](), list[Law]()
        levels = list[list[Law]]()
        level: list[tuple[int, Context]] = [(-1, ())]
        for depth, width in enumerate(widths):
            first, below = level[0][1], list[tuple[int, Context]]()
            levels.append([q((*context, *path)) for _, path in level])
            for (node, path), law in zip(level, levels[-1], strict=True):
                drawn = list[int]()
                for _ in range(width):
                    left = law.probabilities(VOCAB)
                    if origin is Origin.DISTINCT:
                        left[drawn] = 0.0
                    words: Any = noise.words(position + depth, Stream.DRAFT, 0, round_id=len(tokens))
                    drawn.append(int(words.pick(left / left.sum())))
                    below.append((len(tokens), (*path, drawn[-1])))
                    tokens.append(drawn[-1])
                    parents.append(node)
                    laws.append(law)
            level = below
            if not stop.keep(progress_of(levels, (*context, *first), len(tokens)))[0]:
                break
        arrays = (np.array(tokens), np.array(parents), np.zeros(len(tokens), dtype=np.int64))
        return Proposal(*arrays, tuple(laws), origin)

    return draft


def lengths_of(draft: Draft) -> set[int]:
    return {n for _, n in outcomes(lambda choices: len(draft((), ScriptedNoise(choices), 0)))}  # type: ignore[arg-type]


CHAIN = (1,) * LEVELS
CASES: list[tuple[AcceptanceRule, Origin, tuple[int, ...]]] = [
    (RejectionRule(), Origin.DISTINCT, CHAIN),
    (RecursiveRule(), Origin.DISTINCT, CHAIN),
    (CoupledRule(), Origin.DISTINCT, CHAIN),
    (RecursiveRule(), Origin.DISTINCT, (2, 1)),
    (MultiRule(), Origin.INDEPENDENT, (2, 1)),
]
LONGER = [
    pytest.param(RecursiveRule(), Origin.DISTINCT, (2, 1, 1), marks=pytest.mark.slow),
    pytest.param(MultiRule(), Origin.INDEPENDENT, (2, 1, 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("rule", "origin", "widths"), [*CASES, *LONGER], ids=lambda value: getattr(value, "name", str(value))
)
@pytest.mark.parametrize("name", STOPS)
def test_every_stop_is_exact(name: str, rule: AcceptanceRule, origin: Origin, widths: tuple[int, ...]) -> None:
    draft = stopped_tree(Q, STOPS[name], widths, origin)
    if len(widths) == LEVELS:
        assert len(lengths_of(draft)) > 1, "the stop never depends on what was drawn, so nothing is tested"
    assert error_of(rule, P, draft, VOCAB, length=2) < EXACT


@pytest.mark.parametrize("name", STOPS)
def test_three_tokens_under_rejection(name: str) -> None:
    draft = stopped_tree(Q, STOPS[name], (1, 1, 1), Origin.DISTINCT)
    assert error_of(RejectionRule(), P, draft, VOCAB, length=3) < EXACT


def dropping(draft: Draft) -> Draft:
    """Stops at the first token that its own law finds unlikely, and does not keep it."""

    def broken(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
        made = draft(context, noise, position)
        assert made.laws is not None
        pairs = zip(made.tokens.tolist(), made.laws, strict=True)
        likely = [law.probabilities(VOCAB)[token] > 0.3 for token, law in pairs]
        kept = likely.index(False) if False in likely else len(likely)
        if not kept:
            return NOTHING
        return Proposal(made.tokens[:kept], made.parents[:kept], made.key[:kept], made.laws[:kept], made.origin)

    return broken


@pytest.mark.parametrize("rule", [RejectionRule(), RecursiveRule()], ids=lambda rule: rule.name)
def test_a_stop_that_drops_the_token_it_stops_at_is_caught(rule: AcceptanceRule) -> None:
    """Under `coupled` it is harmless: there a token is never a function of the draft."""
    draft = sampled_chain(Q, 2)
    assert error_of(rule, P, draft, VOCAB, length=2) < EXACT
    assert error_of(rule, P, dropping(draft), VOCAB, length=2) > BROKEN
    assert error_of(CoupledRule(), P, dropping(draft), VOCAB, length=2) < EXACT
