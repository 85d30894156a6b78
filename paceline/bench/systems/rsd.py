"""Recursive Speculative Decoding (2402.14160): siblings drawn without replacement, RSD-C and RSD-S.

The draft is the target without a few of its layers; every claim about laws holds for any draft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from paceline.bench.laws import Context as Tokens
from paceline.bench.laws import Draft, ScriptedNoise, sampled_tree
from paceline.bench.systems.base import Row, above, at_least, at_most, exactly, suite
from paceline.bench.systems.chen import EXACT
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import greedy_identity
from paceline.bench.systems.real_laws import TOP, law_error, pairs_p_value
from paceline.bench.systems.trees import no_shorter, try_trees
from paceline.bench.tree_rounds import Trial
from paceline.config import SamplingParams
from paceline.draft.base import Proposal
from paceline.engine.draft_tree import Origin
from paceline.llm import LLM
from paceline.verify.multi import MultiRule
from paceline.verify.recursive import RecursiveRule

NODES, DEPTH = 30, 5
CONSTANT, BEAMS = "rsd-c:widths=2/2/2/1", "rsd-s:width=6"
"""Both have 30 nodes on five levels."""
REPEATING = "branching:widths=2/2/2/1"
"""The tree of `CONSTANT`, whose siblings `multi` draws independently."""
_VOCAB = 2 * TOP
_LEVEL = 1e-3
_LOOP_TOP = 8
_SAMPLES = 64
_BIASED = 1e-3


def _engine(context: Context, tree: str, nodes: int) -> LLM:
    return context.llm(context.draft(f"k={nodes}"), rule="recursive", tree=tree)


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    for tree in ("rsd-c:widths=2/2", "rsd-s:width=3"):
        yield greedy_identity(context, _engine(context, tree, 6), f"E0: greedy output equals plain, {tree}")[0]


def _laws(context: Context) -> Iterator[Row]:
    """E1: the committed law of fixed trees by enumeration."""
    deeper = (((3,), 4), ((2, 1), 2))  # a hundred times the outcomes
    for widths, most in (((2,), context.few(50, 4)), *deeper[: context.few(2, 0)]):
        error, places = law_error(context, RecursiveRule(), _drawn(widths, Origin.DISTINCT), most=most)
        note = f"{places} contexts of the real model, top {TOP}, joint law of two tokens, every outcome"
        yield at_most(f"E1: law of RSD-C {'/'.join(map(str, widths))}, largest error", error, EXACT, note)
    error, places = law_error(context, MultiRule(), _drawn((2,), Origin.INDEPENDENT), most=context.few(10, 4))
    yield at_most("E1: law of independent siblings under multi", error, EXACT, f"{places} contexts")
    error, places = law_error(
        context, RecursiveRule(), lambda q: _by_id(_drawn((2,), Origin.DISTINCT)(q)), most=context.few(5, 2)
    )
    yield above("E1 control: siblings out of order are caught", error, _BIASED, f"{places} contexts")


def _drawn(widths: Sequence[int], origin: Origin):  # type: ignore[no-untyped-def]
    return lambda q: sampled_tree(q, widths, origin, _VOCAB)


def _by_id(draft: Draft) -> Draft:
    """Siblings of one level in the order of their ids instead of that of their draws."""

    def ordered(context: Tokens, noise: ScriptedNoise, position: int) -> Proposal:
        made = draft(context, noise, position)
        return replace(made, tokens=np.sort(made.tokens))

    return ordered


def _loop(context: Context) -> Iterator[Row]:
    """E2: first two tokens of many runs with stochastic beams against their exact joint law."""
    runs = context.few(512, 192)
    prompt = context.prompts(1)[0]
    llm = _engine(context, "rsd-s:width=3", 6)
    pairs: list[tuple[int, int]] = []
    for seed in range(-(-runs // _SAMPLES)):
        context.say(f"E2: {len(pairs)} of {runs} runs")
        count = min(_SAMPLES, runs - len(pairs))
        params = SamplingParams(temperature=1.0, top_k=_LOOP_TOP, max_tokens=3, ignore_eos=True, n=count, seed=seed)
        (generation,) = llm.generate([list(prompt)], params)
        pairs += [(o.token_ids[0], o.token_ids[1]) for o in generation.outputs]
    value = pairs_p_value(llm, prompt, pairs, _LOOP_TOP)
    note = f"{runs} runs at T=1, top-k {_LOOP_TOP}; tests/lossless/test_stochastic_beam.py makes many more"
    yield at_least("E2: p-value of RSD-S", value, _LEVEL, note)


def _lengths(context: Context) -> Iterator[Row]:
    """Accepted length at 30 nodes, T=1: RSD-S, RSD-C, independent siblings."""
    beams, constant = Trial(BEAMS, "recursive", NODES, DEPTH), Trial(CONSTANT, "recursive", NODES, DEPTH)
    independent = Trial(REPEATING, "multi", NODES, DEPTH)
    found = try_trees(context, (beams, constant, independent), context.few(400, 8), 1.0)
    yield no_shorter("RSD-S minus RSD-C, tokens a round", found[beams], found[constant])
    yield no_shorter("RSD-C minus independent siblings", found[constant], found[independent])
    yield no_shorter("RSD-S minus independent siblings", found[beams], found[independent])
    repeats = {trial: sum(one.repeats for one in made) for trial, made in found.items()}
    nodes = sum(len(one.tree) for one in found[independent])
    note = f"of {nodes} nodes drawn with replacement"
    yield above("independent siblings that repeat", repeats[independent] / nodes, 0.0, note)
    yield exactly("RSD siblings that repeat", repeats[beams] + repeats[constant], 0)


run = suite(_identity, _laws, _loop, _lengths)
