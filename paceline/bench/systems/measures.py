"""What tests of several systems measure: equality with plain output, accepted lengths, a chi-square, watched rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from paceline.arrays import FloatArray
from paceline.bench.systems.base import Row, exactly
from paceline.bench.systems.context import Context, tokens_of
from paceline.config import SamplingParams
from paceline.draft.base import Drafter
from paceline.engine.draft_tree import DraftTree
from paceline.engine.rng import Noise, Stream
from paceline.engine.types import Walk
from paceline.llm import LLM
from paceline.verify.base import ROOT, AcceptanceRule, LawSource
from paceline.verify.rejection import RejectionRule

PROMPTS, TOKENS = (20, 4), (64, 24)
"""Of an equality check: full and quick."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What an engine did for some prompts."""

    outputs: tuple[tuple[int, ...], ...]
    target_forwards: int
    draft_tokens: int
    accepted_tokens: int

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return sum(len(output) for output in self.outputs)

    @property
    def mean_accepted_length(self) -> float:
        """Output tokens per target forward that committed; 1 without speculation."""
        return self.tokens / self.target_forwards


def count(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams, *, one_by_one: bool = True) -> Counted:
    """Generate, and add up what the engine counted."""
    groups = [[list(p)] for p in prompts] if one_by_one else [[list(p) for p in prompts]]
    made = [generation for group in groups for generation in llm.generate(group, params)]
    return Counted(
        tuple(tokens_of(made)),
        sum(g.stats.target_forwards for g in made),
        sum(g.stats.draft_tokens for g in made),
        sum(g.stats.accepted_tokens for g in made),
    )


def greedy_identity(context: Context, llm: LLM, test: str = "E0: greedy output equals plain") -> tuple[Row, Counted]:
    """Prompts whose greedy output equals that of plain decoding, token for token and in length."""
    prompts, tokens = context.prompts(context.few(*PROMPTS)), context.few(*TOKENS)
    plain = context.greedy(prompts, tokens)
    context.say(test)
    found = count(llm, prompts, SamplingParams(temperature=0.0, max_tokens=tokens), one_by_one=False)
    same = sum(a == b for a, b in zip(found.outputs, plain, strict=True))
    accepted = found.mean_accepted_length
    note = f"prompts of {len(prompts)}, up to {tokens} tokens, fp32, one batch; accepted length {accepted:.2f}"
    return exactly(test, same, len(prompts), note), found


def law_p_value(counts: FloatArray, law: FloatArray) -> float:
    """Of Pearson's chi-square of counts against a law. Cells that expect fewer than five are pooled.

    A count where the law has no mass gives 0.
    """
    counts, law = counts.ravel(), law.ravel()
    if counts[law == 0.0].any():
        return 0.0
    expected = law * counts.sum()
    large = expected >= 5.0
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    if wanted[-1] < 5.0 and len(wanted) > 1:  # what was pooled is still rare: the smallest of the others joins it
        smallest = int(wanted[:-1].argmin())
        observed[-1], wanted[-1] = observed[-1] + observed[smallest], wanted[-1] + wanted[smallest]
        observed, wanted = np.delete(observed, smallest), np.delete(wanted, smallest)
    if len(wanted) < 2:
        return 1.0
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    half = torch.tensor([(len(wanted) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def combined_p_value(values: Sequence[float]) -> float:
    """Of independent tests together, by Fisher's method: -2 sum log p is a chi-square with two degrees for each."""
    if min(values) == 0.0:
        return 0.0
    half = -float(np.log(values).sum())
    return float(torch.special.gammaincc(torch.tensor(float(len(values))).double(), torch.tensor(half).double()))


def with_rule(llm: LLM, rule: AcceptanceRule) -> LLM:
    """The engine with another rule: one that watches, or one that is broken on purpose."""
    llm.engine.stages = replace(llm.engine.stages, rule=rule)
    return llm


def with_drafter(llm: LLM, drafter: Drafter) -> LLM:
    """The engine with another drafter in the place of its own of the same name."""
    llm.engine.stages.drafting.drafters[drafter.name] = drafter
    return llm


@dataclass
class WatchedRejection(RejectionRule):
    """The rule, noting of every tested token how likely it was to pass and whether it did."""

    chance: list[float] = field(default_factory=list)
    """Sum of min(p, q) at every tested node."""
    passed: list[bool] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    """Tokens that each walk over a draft committed."""
    drafted: list[int] = field(default_factory=list)

    def accept(self, tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int) -> Walk:
        """Walk, then look at what was tested."""
        walk = super().accept(tree, law, noise, position, vocab_size)
        if len(tree):
            self.rounds.append(len(walk.tokens))
            self.drafted.append(len(tree))
        for node in range(min(len(tree), len(walk.path) + 1)):
            p = law(node - 1 if node else ROOT, walk.tokens[:node]).probabilities(vocab_size)
            assert tree.laws is not None, "only sampled drafts have a law to compare"
            q = tree.laws[node].probabilities(vocab_size)
            self.chance.append(float(np.minimum(p, q).sum()))
            self.passed.append(node < len(walk.path))
        return walk


class NoResidual(RejectionRule):
    """Broken on purpose: after a rejection it draws from the target itself and not from what the draft left of it."""

    def accept(self, tree: DraftTree, law: LawSource, noise: Noise, position: int, vocab_size: int) -> Walk:
        """Walk, then draw the recovered token anew."""
        walk = super().accept(tree, law, noise, position, vocab_size)
        kept = len(walk.path)
        if kept == len(tree):
            return walk
        here = law(kept - 1 if kept else ROOT, walk.tokens[:kept])
        again = here.draw(noise.words(position + kept, Stream.TARGET, vocab_size))
        return Walk(walk.path, (*walk.tokens[:kept], again))
