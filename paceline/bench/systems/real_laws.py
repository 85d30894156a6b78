"""Laws of the real model at real contexts, small enough to enumerate every outcome of a rule on them (E1).

At each context the target's and the draft model's logits are cut to their 8 likeliest tokens, and so are those after
every token that either can say there. Tokens are numbered anew at each context, so that all laws live on a vocabulary
of at most 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from paceline.arrays import FloatArray
from paceline.bench.laws import Context as Tokens
from paceline.bench.laws import Draft, LawOf, ScriptedLaw, error_of
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import law_p_value
from paceline.engine.sampling import Law, top_ids
from paceline.llm import LLM
from paceline.model.runner import ForwardBatch, SequenceInput
from paceline.verify.base import AcceptanceRule

TOP = 8
LENGTH = 2
"""Tokens whose joint law is compared."""
_PREFIXES_PER_QUESTION = 5
LONGEST = 60
"""Tokens of a context, its last ones. A draft model reads 512 prompt tokens in a step, so eight requests of this length
all draft in their first step."""
_CONTEXTS = (50, 10)
"""Full and quick."""


@dataclass(frozen=True, slots=True)
class RealLaws:
    """Target and draft law of the next two tokens at one context. Behind them every law is a point, for both."""

    p: LawOf
    q: LawOf
    vocab: int


NextRows = Callable[[Sequence[int]], NDArray[np.float32]]
"""Tokens -> logits after a context, then after the context with each of the tokens.  # [1 + len(tokens), vocab]"""


def real_laws(context: Context) -> list[RealLaws]:
    """Laws at 50 contexts (10 in quick mode): the conversation and part of the answer to several questions."""
    found: list[RealLaws] = context.once("real laws", lambda: _measure(context))
    return found


def law_error(
    context: Context, rule: AcceptanceRule, draft: Callable[[LawOf], Draft], *, most: int | None = None
) -> tuple[float, int]:
    """Largest error of a joint probability that rule and drafter make at any context, and the number of contexts.

    Args:
        context: gives the laws.
        rule: its own code runs.
        draft: from the draft law to a drafter.
        most: contexts looked at; all of them by default.
    """
    laws = real_laws(context)[:most]
    return max(error_of(rule, at.p, draft(at.q), at.vocab, LENGTH) for at in laws), len(laws)


def next_rows(llm: LLM, prefix: Sequence[int], tokens: Sequence[int] = ()) -> NDArray[np.float32]:
    """Logits after `prefix`, then after `prefix` with each of the tokens.  # [1 + len(tokens), vocab]"""
    blocks = llm.engine.stages.scheduler.blocks
    table: list[int] = []
    if not blocks.grow(table, len(prefix) + len(tokens)):
        raise MemoryError("the KV cache has no room for a context")
    try:
        start = len(prefix)
        whole = SequenceInput(prefix, np.arange(start), 0, table)
        rows = [llm.engine.runner.forward(ForwardBatch((whole,), [start - 1])).clone()]
        if tokens:
            each = np.eye(len(tokens), dtype=np.bool_)
            after = SequenceInput(tokens, np.full(len(tokens), start), start, table, each)
            rows.append(llm.engine.runner.forward(ForwardBatch((after,), range(len(tokens)))).clone())
        return np.concatenate([row.float().cpu().numpy() for row in rows])
    finally:
        blocks.release(table)


def prefixes(context: Context, count: int) -> list[list[int]]:
    """Contexts: the end of a conversation and the beginning of the target's own answer to it."""
    questions = -(-count // _PREFIXES_PER_QUESTION)
    prompts = context.prompts(questions)
    outputs = context.greedy(prompts, context.few(64, 24))
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        cuts = np.linspace(0, max(len(output) - 1, 0), _PREFIXES_PER_QUESTION).astype(int)
        found += [[*prompt, *output[:cut]][-LONGEST:] for cut in cuts.tolist()]
    return found[:count]


def telling(context: Context, count: int) -> list[list[int]]:
    """The contexts at which a rule without the residual shows with fewest runs.

    It gives min(p, q) + (1 - sum min(p, q)) p instead of p, so contexts where target and draft agree fully, or not at
    all, tell nothing. What counts is the chi-square that one run adds on average.
    """
    both = [[law(()).probabilities(at.vocab) for law in (at.p, at.q)] for at in real_laws(context)]
    shows = [_shows(p, q) for p, q in both]
    wanted = prefixes(context, context.few(*_CONTEXTS))
    order = sorted(range(len(wanted)), key=lambda i: -shows[i])
    return [wanted[i] for i in order[:count]]


def _shows(p: FloatArray, q: FloatArray) -> float:
    kept = np.minimum(p, q)
    off = kept - kept.sum() * p
    return float((off[p > 0] ** 2 / p[p > 0]).sum())


def _measure(context: Context) -> list[RealLaws]:
    found = []
    wanted = prefixes(context, context.few(*_CONTEXTS))
    for done, prefix in enumerate(wanted):
        context.say(f"Laws of the real model ({done + 1} of {len(wanted)} contexts)")
        found.append(laws_at(partial(next_rows, context.llm(), prefix), partial(next_rows, context.draft_llm, prefix)))
    return found


def laws_at(target: NextRows, draft: NextRows) -> RealLaws:
    """Laws of two tokens at a context, from what gives the logits after it and after it with each token."""
    first = [rows_after([])[0] for rows_after in (target, draft)]
    tokens = _union(first)
    rows = [rows_after(tokens) for rows_after in (target, draft)]
    laws: list[dict[Tokens, Law]] = [{}, {}]
    for place in range(len(tokens) + 1):
        here = _union([row[place] for row in rows])
        path = () if place == 0 else (place - 1,)
        for mine, row in zip(laws, rows, strict=True):
            mine[path] = _cut(row[place], here)
    return RealLaws(_law_of(laws[0]), _law_of(laws[1]), 2 * TOP)


def _union(rows: Sequence[NDArray[np.float32]]) -> list[int]:
    """The tokens that any of the laws can say, in ascending order: their place is their new number."""
    return sorted({int(token) for row in rows for token in top_ids(row, TOP)})


def _cut(row: NDArray[np.float32], tokens: Sequence[int]) -> Law:
    kept = set(top_ids(row, TOP).tolist())
    ids = np.array([place for place, token in enumerate(tokens) if token in kept], dtype=np.int64)
    return ScriptedLaw(row[[tokens[place] for place in ids]].astype(np.float64), ids)


def _law_of(laws: dict[Tokens, Law]) -> LawOf:
    end = ScriptedLaw(np.zeros(1), np.zeros(1, dtype=np.int64))
    return lambda path: laws.get(path, end)


def uniform_law(vocab: int) -> LawOf:
    """A draft that knows nothing: every token alike."""
    flat = ScriptedLaw(np.zeros(vocab), np.arange(vocab, dtype=np.int64))
    end = ScriptedLaw(np.zeros(1), np.zeros(1, dtype=np.int64))
    return lambda path: flat if len(path) < LENGTH else end


def pairs_p_value(llm: LLM, prefix: Sequence[int], pairs: Sequence[tuple[int, int]], top: int) -> float:
    """Of the chi-square of the first two tokens of many runs against their exact joint law at temperature 1.

    Args:
        llm: the target.
        prefix: the prompt of the runs.
        pairs: their first two tokens.
        top: the runs' top-k.
    """
    first = top_ids(next_rows(llm, prefix)[0], top).tolist()
    joint = joint_law(next_rows(llm, prefix, first), first, top)
    counts = np.zeros_like(joint)
    for a, b in pairs:
        if a not in first:
            return 0.0
        counts[first.index(a), b] += 1
    used = (joint > 0).any(axis=0) | (counts > 0).any(axis=0)  # second tokens that never come need no cells
    return law_p_value(counts[:, used], joint[:, used])


def joint_law(rows: NDArray[np.float32], tokens: Sequence[int], top: int) -> FloatArray:
    """Joint law of two tokens, each among its `top` likeliest, from `next_rows`: of first and second token.

    Args:
        rows: after the prefix, then after each of `tokens`.  # [1 + len(tokens), vocab]
        tokens: those that can come first.
        top: tokens kept at each place.

    Returns:
        Probabilities of every pair.  # [len(tokens), vocab]
    """
    joint = np.zeros((len(tokens), rows.shape[1]))
    first = _softmax_top(rows[0], top)
    for place, token in enumerate(tokens):
        joint[place] = first[token] * _softmax_top(rows[place + 1], top)
    return joint


def _softmax_top(row: NDArray[np.float32], top: int) -> FloatArray:
    law = np.zeros(len(row))
    ids = top_ids(row, top)
    weights = np.exp(row[ids].astype(np.float64) - float(row.max()))
    law[ids] = weights / weights.sum()
    return law
