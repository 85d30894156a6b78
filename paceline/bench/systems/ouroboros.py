"""Ouroboros (2402.13720): phrases in the draft, behind it, and from the target, kept from request to request."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.bench.systems.base import Row, above, at_most, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.draft_forwards import spared
from paceline.bench.systems.measures import PROMPTS, TOKENS, greedy_identity
from paceline.llm import LLM

DRAFTED = 8
"""Tokens of a draft; with suffixes there are as many nodes again."""
_FEWER = 0.8
"""Draft forwards per drafted token, from the catalogue."""


def engine(context: Context, options: str = "", nodes: int = 2 * DRAFTED) -> LLM:
    """A new engine with an empty pool."""
    return context.fresh_llm(
        f'ouroboros:model="{context.draft_model}",k={nodes}{options}', max_num_seqs=1, enable_prefix_caching=False
    )


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield greedy_identity(context, engine(context))[0]


def _parts(context: Context) -> Iterator[Row]:
    """The four parts, each left out in turn, and a warm pool."""
    prompts, tokens = context.prompts(context.few(*PROMPTS)), context.few(*TOKENS)
    llm = engine(context)
    whole = spared(context, llm, prompts, tokens)
    warm = spared(context, llm, prompts, tokens)
    made = {
        "phrases": spared(context, engine(context, ",phrases=0"), prompts, tokens),
        "suffixes": spared(context, engine(context, ",suffixes=0", DRAFTED), prompts, tokens),
        "feed": spared(context, engine(context, ",feed=0"), prompts, tokens),
        "reuse": spared(context, engine(context, ",reuse=0"), prompts, tokens),
    }
    yield at_most("draft forwards per drafted token", whole.per_drafted, _FEWER, whole.speed)
    without = made["phrases"]
    yield Row(
        "the same without phrases", without.per_drafted, "= 1", round(without.per_drafted, 6) == 1.0, without.speed
    )
    length = whole.counted.mean_accepted_length
    for part, other in made.items():
        shorter = other.counted.mean_accepted_length
        note = (
            f"accepted length {length:.3f} -> {shorter:.3f}, draft forwards per token {whole.per_token:.3f} -> "
            f"{other.per_token:.3f}, {whole.speed} -> {other.speed}"
        )
        worse = max(length / shorter, other.per_token / whole.per_token)
        yield above(f"without {part}: accepted length or draft forwards are worse by", worse, 1.0, note)
    gain = max(
        warm.counted.mean_accepted_length / length,
        whole.per_drafted / warm.per_drafted,
    )
    note = f"accepted length {length:.3f} -> {warm.counted.mean_accepted_length:.3f}, {whole.speed} -> {warm.speed}"
    yield above("warm pool: accepted length or drafted tokens per forward grow by", gain, 1.0, note)


run = suite(_identity, _parts)
