"""FR-Spec (2502.14856): the draft model's head keeps the most frequent tokens only, a quarter of the vocabulary.

The ranking is the one that ships with the draft, counted on text that the target wrote. Tokens that the head lost are
drafted never and said as often as before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from paceline.bench.laws import LawOf, ScriptedLaw, sampled_chain
from paceline.bench.systems.base import Row, at_least, at_most, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import count, greedy_identity
from paceline.bench.systems.real_laws import law_error
from paceline.config import SamplingParams
from paceline.draft.model_drafter import ModelDrafter
from paceline.llm import LLM
from paceline.model.head_subset import RANKING, SubsetHead
from paceline.verify.recursive import RecursiveRule
from paceline.verify.rejection import RejectionRule

SIZE = 12288
LENGTH = 4
EXACT = 1e-6
_QUESTIONS, _TOKENS = (12, 4), (64, 24)
_ANSWER = (256, 24)
"""Tokens of an answer whose coverage is counted: most answers are whole then, and openings are not all that counts."""
_TIMED = 25
_FOREIGN = (
    "Écris trois phrases en français sur la mer.",
    "Schreibe drei Sätze auf Deutsch über den Wald.",
    "用中文写三句话介绍北京。",
    "Напиши три предложения по-русски о зиме.",
)


def cut_engine(context: Context, **options: object) -> LLM:
    """The engine whose draft model has the cut head."""
    return context.llm(context.draft(f"k={LENGTH},vocab={SIZE}"), **options)


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield greedy_identity(context, cut_engine(context))[0]


def _laws(context: Context) -> Iterator[Row]:
    """E1 at temperature 1: the draft law has no mass on every second of the tokens that matter."""

    def halved(q: LawOf) -> LawOf:
        def law(tokens: tuple[int, ...]) -> ScriptedLaw:
            whole = q(tokens).probabilities(64)
            ids = np.flatnonzero(whole)
            kept = ids[::2]
            return ScriptedLaw(np.log(whole[kept]), kept)

        return law

    for rule in (RejectionRule(), RecursiveRule()):
        error, contexts = law_error(context, rule, lambda q: sampled_chain(halved(q), 2))
        yield at_most(f"E1: law error under {rule.name}", error, EXACT, f"{contexts} contexts of the real model")


def _accepted(context: Context) -> Iterator[Row]:
    """What the cut costs in accepted length, against a random cut of the same size."""
    whole = _length(context, context.llm(context.draft(f"k={LENGTH}")))
    cut = _length(context, cut_engine(context))
    random = _length(context, _random_engine(context))
    loss, control = 1.0 - cut / whole, 1.0 - random / whole
    note = f"{whole:.3f} with the whole head, {cut:.3f} with {SIZE} tokens, {random:.3f} with {SIZE} random ones"
    yield at_most("accepted length lost", loss, 0.08, note)
    yield at_least("control: random subset loses more", control - 3.0 * max(loss, 0.0), 0.0, f"loses {control:.3f}")


def _time(context: Context) -> Iterator[Row]:
    """Time of the draft model's head, in turns."""
    whole = context.loaded.model.get_output_embeddings()
    cut = _head(cut_engine(context))
    row = torch.randn(1, 1, int(context.loaded.config.hidden_size), dtype=context.loaded.dtype)
    taken: dict[str, list[float]] = {"whole": [], "cut": []}
    with torch.inference_mode():
        for _ in range(_TIMED):
            for name, head in (("whole", whole), ("cut", cut)):
                started = time.perf_counter()
                head(row)
                taken[name].append(time.perf_counter() - started)
    saved = 1.0 - float(np.median(taken["cut"]) / np.median(taken["whole"]))
    yield at_least("head time saved", saved, 0.65, f"median of {_TIMED} in turns, one row, {context.loaded.dtype}")


def _coverage(context: Context) -> Iterator[Row]:
    """How much of what the target says the subset holds; other languages draft worse and say the same."""
    kept = set(_head(cut_engine(context)).ids.tolist())
    tokens = context.few(*_TOKENS)
    prompts = context.prompts(context.few(len(context.questions), _QUESTIONS[1]))
    said = [t for output in context.greedy(prompts, context.few(*_ANSWER)) for t in output]
    share = float(np.mean([t in kept for t in said]))
    yield at_least("coverage of real outputs", share, 0.95, f"{len(said)} tokens the target said")
    prompts = [context.encode(text) for text in _FOREIGN]
    plain = context.greedy(prompts, tokens)
    foreign = count(cut_engine(context), prompts, SamplingParams(temperature=0.0, max_tokens=tokens))
    covered = float(np.mean([t in kept for output in plain for t in output]))
    same = sum(a == b for a, b in zip(foreign.outputs, plain, strict=True))
    note = f"accepted length {foreign.mean_accepted_length:.2f}, coverage {covered:.2f}"
    yield at_least("other languages: same output", same, len(prompts), note)


def _length(context: Context, llm: LLM) -> float:
    prompts = context.prompts(context.few(*_QUESTIONS))
    params = SamplingParams(temperature=0.0, max_tokens=context.few(*_TOKENS))
    return count(llm, prompts, params, one_by_one=False).mean_accepted_length


def _random_engine(context: Context) -> LLM:
    """The same with as many random tokens."""
    llm = context.fresh_llm(context.draft(f"k={LENGTH}"))
    model = _drafter(llm).model.runner.model
    head = model.get_output_embeddings()  # type: ignore[operator]
    ids = np.random.default_rng(0).choice(int(context.loaded.config.vocab_size), SIZE, replace=False)
    kept = torch.tensor(np.sort(ids), dtype=torch.int64)
    model.set_output_embeddings(SubsetHead(head.weight, getattr(head, "bias", None), kept))  # type: ignore[operator]
    return llm


def _drafter(llm: LLM) -> ModelDrafter:
    drafter = llm.engine.stages.drafting.drafters["draft"]
    assert isinstance(drafter, ModelDrafter)
    return drafter


def _head(llm: LLM) -> SubsetHead:
    head = _drafter(llm).model.runner.model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, SubsetHead), f"the draft ships without {RANKING}"
    return head


run = suite(_identity, _laws, _accepted, _time, _coverage)
