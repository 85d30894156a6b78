"""MagicDec (2408.11049): the target drafts over a small part of its own KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from paceline.bench.systems.base import Row, above, at_least, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.long_prompts import long_prompts
from paceline.bench.systems.measures import Counted, count, with_drafter
from paceline.config import RequestSpeculation, SamplingParams
from paceline.draft.registry import create, parse_options
from paceline.draft.self_model import Target
from paceline.draft.shapes.chain import ChainShape
from paceline.engine.draft_tree import Origin
from paceline.llm import LLM

LENGTH = (6000, 1200)
"""Tokens of the text: full and quick."""
PROMPTS, TOKENS = (6, 2), (48, 24)
BUDGET = 256
_DRAFTED = 3
_ACCEPTED = 0.7
"""From the catalogue."""


def _options(context: Context) -> dict[str, Any]:
    longest = min(context.few(*LENGTH) + 1024, context.loaded.max_model_len)
    return {"max_model_len": longest, "kv_cache_memory": 900 << 20, "max_num_seqs": 1}


def _prompts(context: Context) -> list[list[int]]:
    def make() -> list[list[int]]:
        return long_prompts(context.llm(), context.few(*LENGTH), context.few(*PROMPTS))

    found: list[list[int]] = context.once("magicdec prompts", make)
    return found


def _engine(context: Context) -> LLM:
    """One for everything, so that the prompts' common text is computed once."""
    return context.llm(f"magicdec:k={_DRAFTED},budget={BUDGET}", **_options(context))


def _counted(context: Context, **options: str) -> Counted:
    """What is drafted and accepted, one token at a time, with these options of the drafter."""

    def make() -> Counted:
        llm = _engine(context)
        target = Target(llm.engine.runner, llm.engine.stages.scheduler.blocks, llm.engine.max_model_len)
        supplies = {
            "target": target,
            "vocab_size": llm.engine.vocab_size,
            "coupled": True,
            "shape": ChainShape(Origin.CHOSEN),
            "stop_ids": llm.engine.eos_token_ids,
        }
        with_drafter(llm, create("magicdec", parse_options("magicdec", options), supplies))
        return count(llm, _prompts(context), _params(context, speculation=RequestSpeculation(cap=1)))

    name = ", ".join(f"{key}={value}" for key, value in options.items())
    context.say(f"MagicDec with {name}")
    found: Counted = context.once(("magicdec", name), make)
    return found


def _params(context: Context, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=context.few(*TOKENS), ignore_eos=True, **options)


def _acceptance(found: Counted) -> float:
    return found.accepted_tokens / found.draft_tokens


def _plain(context: Context) -> Counted:
    def make() -> Counted:
        return count(_engine(context), _prompts(context), _params(context, speculation=RequestSpeculation(off=True)))

    context.say("Plain answers to long prompts")
    found: Counted = context.once("magicdec plain", make)
    return found


def _identity(context: Context) -> Iterator[Row]:
    """E0 and acceptance with a small budget."""
    plain = _plain(context)
    context.say("E0: greedy output on long prompts equals plain")
    found = count(_engine(context), _prompts(context), _params(context))
    prompts: Sequence[Sequence[int]] = _prompts(context)
    same = sum(a == b for a, b in zip(found.outputs, plain.outputs, strict=True))
    note = (
        f"prompts of {len(prompts[0])} tokens, {len(plain.outputs[0])} tokens each, fp32, plain by the "
        f"same engine without look-ahead; accepted length {found.mean_accepted_length:.2f} with k={_DRAFTED}"
    )
    yield exactly("E0: greedy output on long prompts equals plain", same, len(prompts), note)
    accepted = _acceptance(_counted(context, budget=str(BUDGET)))
    note = f"sinks and the latest, {BUDGET} tokens; the answer stands in one passage of the text, mostly outside them"
    yield at_least("acceptance of a draft token", accepted, _ACCEPTED, note)


def _whole(context: Context) -> Iterator[Row]:
    """A budget beyond the context drafts with the target itself."""
    found = _counted(context, budget="65536")
    note = f"{found.draft_tokens} draft tokens"
    yield exactly("acceptance with a budget beyond the context", _acceptance(found), 1.0, note)


def _ablations(context: Context) -> Iterator[Row]:
    """Without sinks, with random blocks, and with the blocks that are attended to."""
    usual = _acceptance(_counted(context, budget=str(BUDGET)))
    bare = _acceptance(_counted(context, budget=str(BUDGET), sinks="0"))
    random = _acceptance(_counted(context, budget=str(BUDGET), select="random"))
    queried = _acceptance(_counted(context, budget=str(BUDGET), select="query"))
    yield above("without sinks: acceptance falls by", usual - bare, 0.02, f"{usual:.3f} -> {bare:.3f}")
    yield above("random blocks: acceptance falls by", usual - random, 0.02, f"{usual:.3f} -> {random:.3f}")
    yield above("blocks chosen by attention over random ones", queried - random, 0.02, f"{random:.3f} -> {queried:.3f}")


run = suite(_identity, _whole, _ablations)
