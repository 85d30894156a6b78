"""Single rounds of draft and acceptance on real models: what a tree and a rule bring, without running an engine.

At one context many rounds are made, with other trees, rules and noise each time. Drafter, shapes and rules are the
engine's own. What is saved is the network: at one context every row of either model is computed once, whichever round
asks for it first, and of the target only those rows are computed that a walk reads. Neither changes what is drafted
or accepted. A context then moves on by the tokens that one of the rounds committed, so the text is the target's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from paceline.arrays import FloatArray
from paceline.config import SamplingParams
from paceline.draft.base import DraftContext
from paceline.draft.draft_model import DraftModel, Scratch, Wanted
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.shapes.base import TreeShape
from paceline.draft.shapes.registry import create_shape, parse_tree
from paceline.draft.tree import build
from paceline.engine.draft_tree import EMPTY_TREE, DraftTree, Origin
from paceline.engine.feedback import node_labels
from paceline.engine.request import Request
from paceline.engine.rng import Noise
from paceline.engine.sampling import Law, build_law
from paceline.engine.types import NodeLabels, Walk
from paceline.llm import LLM
from paceline.verify.registry import create_rule

_ROOM = 512
"""Rows kept at one context, or half of what the model has room for; used up, the context begins anew."""
_MARGIN = 32
"""More than a walk accepts."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one round tries."""

    tree: str
    """A tree setting, as `--tree` reads it."""
    rule: str
    nodes: int
    depth: int


@dataclass(frozen=True, slots=True)
class Round:
    """What came of it."""

    tree: DraftTree
    """Without its laws, which would fill the memory."""
    walk: Walk
    labels: NodeLabels

    @property
    def repeats(self) -> int:
        """Nodes that repeat the token of an earlier sibling."""
        return len(self.tree) - len(set(zip(self.tree.parents.tolist(), self.tree.tokens.tolist(), strict=True)))


class KeptModel(DraftModel):
    """A model whose rows at a context are kept until the context moves on."""

    def __init__(self, llm: LLM, vocab_size: int) -> None:
        super().__init__(
            llm.engine.runner,
            llm.engine.stages.scheduler.blocks,
            vocab_size=vocab_size,
            max_model_len=llm.engine.max_model_len,
            max_tokens=1 << 30,
        )
        self._room = min(_ROOM, llm.engine.max_model_len // 2)
        self._kept: dict[Request, tuple[int, Scratch]] = {}

    def open(self, request: Request, nodes: int) -> Scratch | None:
        """The rows there are."""
        length, scratch = self._kept.get(request, (0, None))
        if scratch is None or length != len(request.token_ids) or len(scratch.tokens) + nodes > self._room:
            scratch = super().open(request, self._room)
            if scratch is None:
                raise MemoryError("no room for a context; make max_model_len and kv_cache_memory larger")
            self._kept[request] = len(request.token_ids), scratch
        return scratch

    def close(self, scratch: Scratch, path: Sequence[int]) -> None:
        """They stay."""

    def forget(self, request: Request) -> None:
        """The request is done."""
        self._kept.pop(request, None)
        super().forget(request)


class _MissingRow(Exception):
    def __init__(self, scratch: Scratch, parent: int, token: int | None) -> None:
        super().__init__()
        self.wanted = Wanted(scratch, [] if token is None else [(parent, token)])


class TreeRounds:
    """Makes rounds.

    Args:
        target: gives the target's network and cache; its engine is not run.
        draft: likewise the draft model's.
    """

    def __init__(self, target: LLM, draft: LLM) -> None:
        self._vocab_size = target.engine.vocab_size
        self._target = KeptModel(target, self._vocab_size)
        self._draft = KeptModel(draft, self._vocab_size)
        self._drafters: dict[tuple[str, str], ModelDrafter] = {}

    def drafter(self, trial: Trial) -> ModelDrafter:
        """Who drafts for a trial."""
        key = trial.tree, trial.rule
        if key not in self._drafters:
            origin = create_rule(trial.rule).branches or Origin.DISTINCT
            self.use(trial, create_shape(parse_tree(trial.tree), origin))
        return self._drafters[key]

    def use(self, trial: Trial, shape: TreeShape) -> None:
        """Grow the trees of a trial by this shape."""
        made = ModelDrafter(
            self._draft.runner,
            self._draft.blocks,
            vocab_size=self._vocab_size,
            coupled=create_rule(trial.rule).shares_noise,
            shape=shape,
        )
        made.model = self._draft
        self._drafters[trial.tree, trial.rule] = made

    def run(
        self, requests: Sequence[Request], trial: Trial, seeds: Sequence[int], acceptance: FloatArray | None = None
    ) -> list[Round]:
        """One round for each request.

        Args:
            requests: at their contexts; none must be greedy.
            trial: what to try.
            seeds: of the noise.
            acceptance: estimates by confidence class; None: the shape's prior.  # [num_keys]
        """
        for request, seed in zip(requests, seeds, strict=True):
            request.seed = seed
        drafter = self.drafter(trial)
        expected = drafter.prior if acceptance is None else acceptance
        contexts = [DraftContext(r, trial.nodes, i, trial.depth, expected) for i, r in enumerate(requests)]
        trees = [build("draft", p, expected) if len(p) else EMPTY_TREE for p in drafter.propose(contexts)]
        walks = self._walks(requests, trees, trial)
        table = {"draft": expected[None]}
        return [
            Round(replace(tree, laws=None), walk, node_labels([(0, tree, walk.tokens)], table))
            for tree, walk in zip(trees, walks, strict=True)
        ]

    def move_on(self, requests: Sequence[Request], rounds: Sequence[Round]) -> None:
        """Take the committed tokens into the contexts."""
        for request, made in zip(requests, rounds, strict=True):
            request.token_ids.extend(made.walk.tokens)  # a context of a bench, which no engine knows

    def forget(self, requests: Sequence[Request]) -> None:
        """Give their blocks back."""
        for request in requests:
            self._target.forget(request)
            self._draft.forget(request)

    def _walks(self, requests: Sequence[Request], trees: Sequence[DraftTree], trial: Trial) -> list[Walk]:
        """Walk all trees; rows that walks miss are computed together, and those walks begin again."""
        rule = create_rule(trial.rule)
        done: dict[int, Walk] = {}
        while len(done) < len(trees):
            missing: list[Wanted] = []
            for i, (request, tree) in enumerate(zip(requests, trees, strict=True)):
                if i in done:
                    continue
                law, noise = self._law(request), Noise(request.seed)
                try:
                    done[i] = rule.accept(tree, law, noise, len(request.token_ids), self._vocab_size)
                except _MissingRow as question:
                    missing.append(question.wanted)
            if missing:
                self._target.score(missing)
        return [done[i] for i in range(len(trees))]

    def _law(self, request: Request) -> _Laws:
        scratch = self._target.open(request, _MARGIN)
        assert scratch is not None
        return _Laws(scratch, request.params)


@dataclass(frozen=True, slots=True)
class _Laws:
    """The target's laws at one context."""

    scratch: Scratch
    params: SamplingParams

    def __call__(self, node: int, path: Sequence[int]) -> Law:  # noqa: ARG002
        if self.scratch.root_row is None:
            raise _MissingRow(self.scratch, -1, None)
        at = -1
        for token in path:
            found = self.scratch.place.get((at, token))
            if found is None:
                raise _MissingRow(self.scratch, at, token)
            at = found
        return build_law(self.scratch.row(at), self.params, (), path)


class RankCounts:
    """How often siblings of each rank were accepted: a positional acceptance vector in the making.

    Args:
        prior: what is believed before, and counts as `weight` trials.  # [ranks]
    """

    def __init__(self, prior: FloatArray, weight: float = 4.0) -> None:
        self._prior, self._weight = prior, weight
        self.tried = np.zeros(len(prior))
        self.accepted = np.zeros(len(prior))

    def add(self, labels: NodeLabels) -> None:
        """Take in the labels of a round of shape `sequoia`."""
        self.tried += np.bincount(labels.key, minlength=len(self.tried))
        self.accepted += np.bincount(labels.key, labels.accepted, minlength=len(self.tried))

    @property
    def estimates(self) -> FloatArray:
        """By rank.  # [ranks]"""
        return np.asarray((self._weight * self._prior + self.accepted) / (self._weight + self.tried))


class Walkers:
    """Requests that walk along the target's answers, each to the next question when its answer has become long.

    Args:
        rounds: moves them.
        prompts: of the questions; after the last comes the first.
        params: of the requests; `max_tokens` is a long answer.
        count: how many.
    """

    def __init__(
        self, rounds: TreeRounds, prompts: Sequence[Sequence[int]], params: SamplingParams, count: int
    ) -> None:
        self._prompts = itertools.cycle(prompts)
        self._rounds, self._params = rounds, params
        self.requests = [self._next() for _ in range(count)]

    def _next(self) -> Request:
        prompt = list(next(self._prompts))
        return Request(id="", token_ids=prompt, prompt_len=len(prompt), params=self._params, seed=0)

    def move_on(self, made: Sequence[Round]) -> None:
        """Take the tokens that these rounds committed."""
        self._rounds.move_on(self.requests, made)
        for i, request in enumerate(self.requests):
            if request.num_output >= self._params.max_tokens:
                self._rounds.forget([request])
                self.requests[i] = self._next()

    def close(self) -> None:
        """Give all blocks back."""
        self._rounds.forget(self.requests)


def learn_ranks(
    rounds: TreeRounds, walkers: Walkers, rules: Sequence[str], trial: Trial, seeds: Iterator[int], contexts: int
) -> dict[str, FloatArray]:
    """Positional vectors by rule, learned as an engine would: by the labels of Sequoia's own trees, planned anew.

    Args:
        rounds: makes them.
        walkers: at whose contexts; they are closed in the end.
        rules: under which.
        trial: the tree; its rule does not matter.
        seeds: of the noise.
        contexts: how many.
    """
    known = {rule: RankCounts(rounds.drafter(replace(trial, rule=rule)).prior) for rule in rules}
    for _ in range(0, contexts, len(walkers.requests)):
        for rule, counts in known.items():
            mine = list(itertools.islice(seeds, len(walkers.requests)))
            made = rounds.run(walkers.requests, replace(trial, rule=rule), mine, counts.estimates)
            for one in made:
                counts.add(one.labels)
        walkers.move_on(made)
    walkers.close()
    return {rule: counts.estimates for rule, counts in known.items()}


def bootstrap(
    sums: Mapping[str, NDArray[np.float64]], resamples: int = 2000, seed: int = 0
) -> Mapping[str, NDArray[np.float64]]:
    """Resampled means of figures that were measured at the same places, so that their differences can be told.

    Args:
        sums: per figure a value for each place; places are what is drawn anew, since what is measured at one place
            hangs together.  # [places] each

    Returns:
        Means over the drawn places, the same draw for all figures.  # [resamples] each
    """
    places = len(next(iter(sums.values())))
    drawn = np.random.default_rng(seed).multinomial(places, np.full(places, 1.0 / places), size=resamples)
    return {name: drawn @ values / places for name, values in sums.items()}
