"""Runs the real acceptance rules over every outcome of their noise, so that the law of what they commit is exact.

Noise is scripted: wherever a rule (or a drafter) draws from a law or compares its uniform, the run forks, and each
branch carries its probability. A uniform is symbolic: `uniform * q < p` holds with probability min(1, p / q). Nothing
is sampled, so an error of one part in 10^12 shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np

from paceline.arrays import FloatArray
from paceline.config import SamplingParams
from paceline.draft.base import NOTHING, Proposal, chain
from paceline.draft.tree import build
from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.rng import Stream
from paceline.engine.sampling import Law, build_law
from paceline.verify.base import AcceptanceRule

Result = TypeVar("Result")
Context = tuple[int, ...]
LawOf = Callable[[Context], Law]
Draft = Callable[[Context, "ScriptedNoise", int], Proposal]
OneRound = Callable[[Context], Sequence[tuple[float, Context]]]


@dataclass
class Choices:
    """One run: the first choices are prescribed, later ones take the first outcome that can happen."""

    prescribed: tuple[int, ...] = ()
    made: list[int] = field(default_factory=list)
    possible: list[list[int]] = field(default_factory=list)
    probability: float = 1.0

    def pick(self, weights: Sequence[float]) -> int:
        """An outcome with its probability."""
        possible = [i for i, weight in enumerate(weights) if weight > 0.0]
        step = len(self.made)
        chosen = self.prescribed[step] if step < len(self.prescribed) else possible[0]
        self.made.append(chosen)
        self.possible.append(possible)
        self.probability *= weights[chosen]
        return chosen


def outcomes(run: Callable[[Choices], Result]) -> Iterator[tuple[float, Result]]:
    """Every outcome of a run that makes its choices through `Choices`, with its probability."""
    pending: list[tuple[int, ...]] = [()]
    while pending:
        choices = Choices(pending.pop())
        result = run(choices)
        yield choices.probability, result
        for step in range(len(choices.prescribed), len(choices.made)):
            others = choices.possible[step][1:]
            pending.extend((*choices.made[:step], other) for other in others)


class ScriptedLaw(Law):
    """A law whose draw is a fork."""

    def draw(self, words: Any) -> int:
        """Every token of the support, by its probability."""
        if len(self.logits) == 1:
            return super().draw(np.zeros(1, dtype=np.uint32))
        size = len(self.logits) if self.ids is None else int(self.ids[-1]) + 1
        return int(words.pick(self.probabilities(size)))


class _Uniform:
    """A uniform on (0, 1) that is only ever compared as `uniform * q < p`."""

    __array_ufunc__ = None

    def __init__(self, choices: Choices, factor: float = 1.0) -> None:
        self._choices = choices
        self._factor = factor

    def __mul__(self, factor: float) -> _Uniform:
        return _Uniform(self._choices, self._factor * float(factor))

    __rmul__ = __mul__

    def __lt__(self, bound: float) -> bool:
        passes = 1.0 if bound >= self._factor else float(bound) / self._factor
        return self._choices.pick([1.0 - passes, passes]) == 1


class ScriptedNoise:
    """Noise whose every read is a fork. A place that decided once must not decide again."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._read: set[tuple[int, Stream, int]] = set()

    def words(self, position: int, stream: Stream, count: int, round_id: int = 0) -> Choices:  # noqa: ARG002
        """What `ScriptedLaw.draw` takes."""
        self._once(position, stream, round_id)
        return self._choices

    def uniform(self, position: int, stream: Stream, number: int = 0) -> _Uniform:
        """What the accept test compares."""
        self._once(position, stream, number)
        return _Uniform(self._choices)

    def _once(self, position: int, stream: Stream, number: int) -> None:
        place = position, stream, number
        assert place not in self._read, f"{stream.name} at {position}, number {number}, is used twice"
        self._read.add(place)


def random_laws(seed: int, vocab: int, params: SamplingParams, *, spread: float = 1.5) -> LawOf:
    """A law for every context, with all sampling options applied by the engine's own code."""

    @cache
    def law(context: Context) -> Law:
        row = np.random.default_rng([seed, vocab, *context]).normal(0, spread, vocab).astype(np.float32)
        made = build_law(row, params, [0], context, [vocab - 1])
        return ScriptedLaw(made.logits, made.ids)

    return law


def sampled_chain(q: LawOf, length: int, *, before: Callable[[Law], bool] = lambda _: False) -> Draft:
    """Tokens drawn from q. `before` may end the chain, looking only at the law of the token that would come next."""

    def draft(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
        tokens: list[int] = []
        laws: list[Law] = []
        while len(tokens) < length:
            law = q((*context, *tokens))
            if before(law):
                break
            laws.append(law)
            tokens.append(law.draw(noise.words(position + len(tokens), Stream.DRAFT, 0)))  # type: ignore[arg-type]
        return chain(tokens, [0] * len(tokens), tuple(laws)) if tokens else NOTHING

    return draft


def sampled_tree(q: LawOf, widths: Sequence[int], origin: Origin, vocab: int) -> Draft:
    """Siblings drawn from q, level by level; without replacement they go on uniformly when q has no token left."""

    def draft(context: Context, noise: ScriptedNoise, position: int) -> Proposal:
        tokens: list[int] = []
        parents: list[int] = []
        laws: list[Law] = []
        level: list[tuple[int, Context]] = [(-1, ())]
        for depth, width in enumerate(widths):
            below: list[tuple[int, Context]] = []
            for node, path in level:
                law = q((*context, *path))
                drawn: list[int] = []
                for _ in range(width):
                    left = law.probabilities(vocab)
                    if origin is Origin.DISTINCT:
                        left[drawn] = 0.0
                        if left.sum() == 0.0:
                            left = np.array([float(t not in drawn) for t in range(vocab)])
                    words: Any = noise.words(position + depth, Stream.DRAFT, 0, round_id=len(tokens))
                    token = int(words.pick(left / left.sum()))
                    drawn.append(token)
                    below.append((len(tokens), (*path, token)))
                    tokens.append(token)
                    parents.append(node)
                    laws.append(law)
            level = below
        arrays = (np.asarray(tokens), np.asarray(parents), np.zeros(len(tokens), dtype=np.int64))
        return Proposal(*arrays, tuple(laws), origin)

    return draft


def chosen_chain(choose: Callable[[Context], int], length: int) -> Draft:
    """Tokens that are a function of the context: point masses."""

    def draft(context: Context, _noise: ScriptedNoise, _position: int) -> Proposal:
        tokens: list[int] = []
        while len(tokens) < length:
            tokens.append(choose((*context, *tokens)))
        return chain(tokens, [0] * length)

    return draft


def make_tree(tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
    """A tree of deterministic tokens."""
    n = len(tokens)
    return DraftTree(
        tokens=np.array(tokens, dtype=np.int64),
        parents=np.array(parents, dtype=np.int64),
        drafter=("test",) * n,
        key=np.zeros(n, dtype=np.int64),
        survival=np.full(n, 0.5),
    )


def tree_of(proposal: Proposal) -> DraftTree:
    """The tree the draft stage makes of a proposal."""
    return build("draft", proposal, np.array([0.5]))


def committed_law(rule: AcceptanceRule, p: LawOf, draft: Draft, vocab: int, length: int) -> FloatArray:
    """Joint law of the first `length` tokens that rule and drafter commit, round after round.  # [vocab] * length"""

    @cache
    def one_round(context: Context) -> tuple[tuple[float, Context], ...]:
        def run(choices: Choices) -> Context:
            noise = ScriptedNoise(choices)
            tree = tree_of(draft(context, noise, len(context)))
            walk = rule.accept(
                tree,
                lambda _node, path: p((*context, *path)),
                noise,  # type: ignore[arg-type]
                len(context),
                vocab,
            )
            assert [int(tree.tokens[node]) for node in walk.path] == list(walk.tokens[:-1])
            return walk.tokens

        return tuple(outcomes(run))

    return law_of_rounds(one_round, vocab, length)


def law_of_rounds(one_round: OneRound, vocab: int, length: int) -> FloatArray:
    """Joint law of the first `length` tokens, from what a round behind each context commits.  # [vocab] * length"""
    joint = np.zeros((vocab,) * length)

    def go(context: Context, weight: float) -> None:
        if len(context) >= length:
            joint[context[:length]] += weight
            return
        for probability, tokens in one_round(context):
            go((*context, *tokens), weight * probability)

    go((), 1.0)
    return joint


def target_law(p: LawOf, vocab: int, length: int) -> FloatArray:
    """Joint law of the first `length` tokens of the target itself.  # [vocab] * length"""
    joint = np.zeros((vocab,) * length)
    for context in np.ndindex(*joint.shape):
        joint[context] = np.prod([p(context[:i]).probabilities(vocab)[token] for i, token in enumerate(context)])
    return joint


def error_of(rule: AcceptanceRule, p: LawOf, draft: Draft, vocab: int, length: int) -> float:
    """Largest error in the probability of any sequence of the first `length` committed tokens."""
    return float(np.abs(committed_law(rule, p, draft, vocab, length) - target_law(p, vocab, length)).max())
