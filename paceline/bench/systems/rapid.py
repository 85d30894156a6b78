"""RAPID (2502.20330): the target drafts for itself on retrieved parts of a long prompt, and the knowledge transfer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from paceline.arrays import FloatArray
from paceline.bench.laws import error_of, sampled_chain
from paceline.bench.systems.base import Row, above, at_least, at_most, exactly, suite
from paceline.bench.systems.context import Context, tokens_of
from paceline.bench.systems.long_prompts import PASSAGES, long_prompts
from paceline.bench.systems.long_rows import LongAnswers, agreement
from paceline.bench.systems.measures import NoResidual, count
from paceline.bench.systems.real_laws import LENGTH as JOINT
from paceline.config import RequestSpeculation, SamplingParams
from paceline.draft.base import DraftContext
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.reading import Reading
from paceline.draft.retrieved import ReadingLimits, RetrievedText
from paceline.draft.retrievers.registry import Retriever, create_retriever
from paceline.draft.shapes.chain import ChainShape
from paceline.engine.draft_tree import Origin
from paceline.engine.request import Request
from paceline.llm import LLM
from paceline.verify.base import AcceptanceRule
from paceline.verify.coupled import CoupledRule
from paceline.verify.rejection import RejectionRule

LENGTH = (4000, 1000)
"""Tokens of the long text: full and quick."""
ANSWERS = (6, 3)
TOKENS = (32, 16)
LIMITS = ReadingLimits(start=32, chunk=64, budget=512, question=96)
STRENGTHS = (0.0, 1.0, 5.0, 10.0, 20.0)
_MILD = 3
"""The first so many strengths are looked at for themselves, too: a large step goes past the draft's law."""
_SHORT, _LONG = 2000, 6000
"""Tokens of the texts whose draft times are compared."""
_TIMED = 2
"""Prompts whose answers are timed, with and without drafts."""
_EXACT = 1e-6
_RETRIEVED_GAIN = 0.05
_ROOM = {"max_num_seqs": 1}
_KV_BYTES = 900 << 20


class RandomRetriever:
    """Any chunks: the control."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def scores(self, query: str, chunks: Sequence[str]) -> FloatArray:  # noqa: ARG002
        """Anything above 0."""
        return self._rng.random(len(chunks)) + 0.1


class NoRetriever:
    """No chunk at all."""

    def scores(self, query: str, chunks: Sequence[str]) -> FloatArray:  # noqa: ARG002
        """Nothing fits."""
        return np.zeros(len(chunks))


def _options(context: Context) -> dict[str, Any]:
    longest = context.few(*LENGTH) + 1024
    return {"max_model_len": min(longest, context.loaded.max_model_len), "kv_cache_memory": _KV_BYTES, **_ROOM}


def _spec(options: str) -> str:
    limits = f"start={LIMITS.start},chunk={LIMITS.chunk},budget={LIMITS.budget},question={LIMITS.question}"
    return f"rapid:model=self,{limits},{options}"


def _long(context: Context) -> LongAnswers:
    def make() -> LongAnswers:
        sizes = (context.few(*size) for size in (LENGTH, ANSWERS, TOKENS))
        return LongAnswers(context, *sizes, **_options(context))

    found: LongAnswers = context.once("long answers", make)
    return found


def _reading(context: Context, retriever: Retriever) -> RetrievedText:
    return RetrievedText(retriever, context.loaded.tokenizer, LIMITS)


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output on long prompts equals plain."""
    long = _long(context)
    params = SamplingParams(temperature=0.0, max_tokens=context.few(*TOKENS))
    expected = [a.tokens for a in long.answers]
    llm = context.llm(_spec("k=4"), **_options(context))
    found = count(llm, long.prompts, params)
    same = sum(a == b for a, b in zip(found.outputs, expected, strict=True))
    seconds = np.zeros((2, _TIMED))
    for i in range(_TIMED):
        for mine, engine in zip(seconds, (long.llm, llm), strict=True):
            started = time.perf_counter()
            engine.generate(long.prompts[i], params)
            mine[i] = time.perf_counter() - started
    ratio = median(seconds[0] / seconds[1])
    note = (
        f"prompts of {len(long.prompts[0])} tokens with one text, up to {params.max_tokens} tokens each, fp32; "
        f"accepted length {found.mean_accepted_length:.2f} with k=4; {ratio:.2f}x the speed of plain, "
        "the target's KV of the prompts cached for both, the draft model's short text read anew"
    )
    yield exactly("E0: greedy output on long prompts equals plain", same, len(long.prompts), note)


def _law(context: Context) -> Iterator[Row]:
    """E1: the committed law at transfer 0, by enumeration."""
    places = context.few(18, 6)
    laws = _long(context).laws(_reading(context, create_retriever("bm25")), places)

    def error(rule: AcceptanceRule) -> float:
        return max(error_of(rule, at.p, sampled_chain(at.q, 2), at.vocab, JOINT) for at in laws)

    note = f"{len(laws)} places in answers to long prompts, draft on retrieved chunks, top 8, joint law of two tokens"
    yield at_most("E1: law of rejection, largest error", error(RejectionRule()), _EXACT, note)
    yield at_most("E1: law of coupled, largest error", error(CoupledRule()), _EXACT, note)
    yield above("E1 control: no residual is caught", error(NoResidual()), 1e-3, "a rule broken on purpose")


def _retrieval(context: Context) -> Iterator[Row]:
    """How often the draft agrees, by what it reads."""
    long = _long(context)
    found = _passages_read(context, long)
    retrieved = agreement(long.target_rows, _retrieved_rows(context)).acceptance
    chance = [
        agreement(long.target_rows, long.draft_rows(_reading(context, RandomRetriever(seed)))).acceptance
        for seed in range(context.few(2, 1))
    ]
    nothing = agreement(long.target_rows, long.draft_rows(_reading(context, NoRetriever()))).acceptance
    rows = sum(map(len, long.target_rows))
    note = (
        f"sum min(p, q) at T=1 over {rows} tokens of the target's greedy answers: retrieved {retrieved:.3f}, random "
        f"chunks {min(chance):.3f} to {max(chance):.3f}, start and question alone {nothing:.3f}; BM25 finds {found} of "
        f"{len(long.prompts)} passages with {LIMITS.budget} of {len(long.prompts[0])} tokens"
    )
    yield at_least("acceptance, retrieved over random", retrieved - float(np.mean(chance)), _RETRIEVED_GAIN, note)


def _retrieved_rows(context: Context) -> list[torch.Tensor]:
    def make() -> list[torch.Tensor]:
        return _long(context).draft_rows(_reading(context, create_retriever("bm25")))

    found: list[torch.Tensor] = context.once("rows of a retrieved text", make)
    return found


def _passages_read(context: Context, long: LongAnswers) -> int:
    reading, step = _reading(context, create_retriever("bm25")), len(PASSAGES) // len(long.prompts)
    texts = [context.loaded.tokenizer.decode(a.short(reading, 0)) for a in long.answers]
    return sum(p.text in text for p, text in zip(PASSAGES[::step], texts, strict=False))


def _transfer(context: Context) -> Iterator[Row]:
    """What the knowledge transfer does, by its strength, and that its law does not depend on the look-ahead."""
    long = _long(context)
    likes = _retrieved_rows(context)
    found = [agreement(long.target_rows, likes, strength) for strength in STRENGTHS]
    for few in (_MILD, len(STRENGTHS)):
        accepted, diverged = ([getattr(a, name) for a in found[:few]] for name in ("acceptance", "divergence"))
        strengths = "strengths " + "/".join(f"{s:g}" for s in STRENGTHS[:few])
        note = "sum min(p', q): " + ", ".join(f"{a:.4f}" for a in accepted)
        yield above(f"acceptance rises, {strengths}: least step", float(np.diff(accepted).min()), 0.0, note)
        note = "mean KL(p' || q): " + ", ".join(f"{d:.4f}" for d in diverged)
        yield above(f"KL(p' || q) falls, {strengths}: least step", float(-np.diff(diverged).max()), 0.0, note)
    yield _one_text(context)


def _one_text(context: Context) -> Row:
    """In a shorter text, since the declared target's first tokens cost its draft model's prefill, too."""
    options = {**_options(context), "max_model_len": LENGTH[1] + 1024}
    llm = context.llm(_spec("k=4,transfer=10"), **options)
    prompts = long_prompts(llm, LENGTH[1], context.few(3, 2))
    jobs = [(p, t) for p in prompts for t in (0.0, 1.0)]

    def texts(engine: LLM, wish: RequestSpeculation | None) -> list[tuple[int, ...]]:
        context.say("Texts of the declared target")
        params = [SamplingParams(temperature=t, seed=1, max_tokens=20, speculation=wish) for _, t in jobs]
        return tokens_of([engine.generate(p, q)[0] for (p, _), q in zip(jobs, params, strict=True)])

    found = [texts(llm, wish) for wish in (None, RequestSpeculation(cap=1), RequestSpeculation(off=True))]
    same = sum(a == b == c for a, b, c in zip(*found, strict=True))
    plain = texts(context.llm(**options), None)
    others = sum(a != b for a, b in zip(found[0], plain, strict=True))
    note = (
        f"transfer 10, look-ahead 4, 1 and 0, temperatures 0 and 1; {others} of {len(jobs)} are not the plain target's"
    )
    return exactly("one text of the declared target for every look-ahead", same, len(jobs), note)


def _time(context: Context) -> Iterator[Row]:
    """Draft time by the prompt's length."""
    long = _long(context)
    prompt = long.prompts[0]
    short, longer = (long_prompts(context.llm(), length, 1)[0] for length in (_SHORT, _LONG))
    repeats = context.few(15, 4)
    context.say("Draft times")
    found = _draft_seconds(context, short, longer, repeats)
    note = (
        f"prompts of {len(longer)} and {len(short)} tokens, {repeats} rounds by turns; a draft of 4 tokens takes "
        f"{median(found[:, 1]) * 1e3:.0f} ms"
    )
    yield at_most("draft time, long over short prompt", median(found[:, 1] / found[:, 0]), 1.1, note)
    whole = np.array([[long.step_seconds(p) for p in (prompt[: len(prompt) // 3], prompt)] for _ in range(repeats)])
    note = (
        f"a forward of the target takes {median(whole[:, 1]) * 1e3:.0f} ms behind {len(prompt)} tokens, against a third"
    )
    yield above("control: the same of one token that reads everything", median(whole[:, 1] / whole[:, 0]), 1.1, note)


def _draft_seconds(context: Context, short: Sequence[int], long: Sequence[int], repeats: int) -> FloatArray:
    """By turns, each after one token more, which the draft model did not expect.  # [repeats, 2]"""
    drafter = _drafter(context.llm(_spec("k=4"), **_options(context)), _reading(context, create_retriever("bm25")))
    requests = [Request(f"t{len(p)}", list(p), len(p), SamplingParams(temperature=0.0), 0) for p in (short, long)]
    found = np.zeros((repeats, 2))
    try:
        for request in requests:
            while not len(drafter.propose([DraftContext(request, 4)])[0]):
                continue
        for seconds in found:
            for i, request in enumerate(requests):
                request.token_ids += [request.token_ids[-2]]
                started = time.perf_counter()
                drafter.propose([DraftContext(request, 4)])
                seconds[i] = time.perf_counter() - started
    finally:
        for request in requests:
            drafter.forget(request)
    return found


def _drafter(llm: LLM, reading: Reading) -> ModelDrafter:
    """A drafter of this reading on the engine's draft model."""
    (own,) = llm.engine.stages.drafting.drafters.values()
    assert isinstance(own, ModelDrafter)
    return ModelDrafter(
        own.model.runner,
        own.model.blocks,
        vocab_size=llm.engine.vocab_size,
        coupled=True,
        shape=ChainShape(Origin.CHOSEN),
        max_model_len=llm.engine.max_model_len,
        reading=reading,
    )


run = suite(_identity, _law, _retrieval, _transfer, _time)
