"""MagicDec (2408.11049): the target drafts over a small part of its own KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from paceline.bench.systems.base import Row, above, at_least, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.long_prompts import long_prompts
from paceline.bench.systems.measures import Counted, count
from paceline.config import SamplingParams
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


def _counted(context: Context, options: str) -> Counted:
    """What an engine drafts and accepts; its prompts' common text is computed once."""

    def make() -> Counted:
        llm = context.llm(f"magicdec:k={_DRAFTED},{options}", **_options(context))
        found = count(llm, _prompts(context), _params(context))
        llm.close()
        return found

    context.say(f"MagicDec with {options}")
    found: Counted = context.once(("magicdec", options), make)
    return found


def _params(context: Context) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=context.few(*TOKENS), ignore_eos=True)


def _acceptance(found: Counted) -> float:
    return found.accepted_tokens / found.draft_tokens


def _plain(context: Context) -> Counted:
    def make() -> Counted:
        llm: LLM = context.llm(**_options(context))
        found = count(llm, _prompts(context), _params(context))
        llm.close()
        return found

    context.say("Plain answers to long prompts")
    found: Counted = context.once("magicdec plain", make)
    return found


def _identity(context: Context) -> Iterator[Row]:
    """E0 and acceptance with a small budget."""
    plain, found = _plain(context), _counted(context, f"budget={BUDGET}")
    prompts: Sequence[Sequence[int]] = _prompts(context)
    same = sum(a == b for a, b in zip(found.outputs, plain.outputs, strict=True))
    note = f"prompts of {len(prompts[0])} tokens, {len(plain.outputs[0])} tokens each, fp32"
    yield exactly("E0: greedy output on long prompts equals plain", same, len(prompts), note)
    note = f"sinks and the latest, {BUDGET} tokens; accepted length {found.mean_accepted_length:.2f} with k={_DRAFTED}"
    yield at_least("accepted of what is drafted", _acceptance(found), _ACCEPTED, note)


def _whole(context: Context) -> Iterator[Row]:
    """A budget beyond the context drafts with the target itself."""
    found = _counted(context, "budget=65536")
    note = f"accepted length {found.mean_accepted_length:.2f} with k={_DRAFTED}"
    yield exactly("accepted of what is drafted, budget beyond the context", _acceptance(found), 1.0, note)


def _ablations(context: Context) -> Iterator[Row]:
    """Without sinks, with random blocks, and with the blocks that are attended to."""
    usual = _acceptance(_counted(context, f"budget={BUDGET}"))
    for options, what in (("sinks=0", "without sinks"), ("select=random", "random blocks")):
        other = _acceptance(_counted(context, f"budget={BUDGET},{options}"))
        yield above(f"{what}: acceptance falls by", usual - other, 0.02, f"{usual:.3f} -> {other:.3f}")
    queried = _acceptance(_counted(context, f"budget={BUDGET},select=query"))
    yield above("blocks chosen by attention over random ones", queried - other, 0.02, f"{other:.3f} -> {queried:.3f}")


run = suite(_identity, _whole, _ablations)
