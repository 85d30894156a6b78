"""EMS-SD (2405.07542): a batch of drafts of different length, with no padding in the input and none in the KV cache.

Prompt lookup drafts, as in the paper: some rows have a match and some have none. The KV cache has blocks of one token
here, so that blocks are slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from paceline.bench.systems.base import Row, above, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.measures import count
from paceline.config import SamplingParams
from paceline.engine.types import DraftBatch, ScheduledBatch, TargetScores
from paceline.errors import PacelineError
from paceline.llm import LLM
from paceline.verify.verifier import Verifier

LENGTH = 7
"""Tokens copied at a match, as in the paper's experiments."""
BATCHES = (2, 4, 8)


@dataclass
class Seen:
    """What went through the network and lay in the cache, step by step."""

    flat: list[int] = field(default_factory=list)
    """Committed tokens and draft tokens over all rows: 1 + draft of a row that decodes."""
    mlp: list[int] = field(default_factory=list)
    """Tokens that the first MLP was given."""
    slots: list[int] = field(default_factory=list)
    """KV slots in use."""
    real: list[int] = field(default_factory=list)
    """KV slots that the rows' tokens need."""
    ragged: int = 0
    """Steps in which rows had drafts of different length."""
    decoded: int = 0
    """Tokens through the network in steps without prompt tokens."""
    decoded_padded: int = 0
    """The same, every row as wide as the widest."""
    kept: int = 0
    """KV slots of output tokens, summed over those steps."""
    kept_padded: int = 0
    """The same, if all rows advanced by the longest acceptance of every step."""


class Watching(Verifier):
    """The verify stage, noting the shape of every step."""

    def __init__(self, llm: LLM, seen: Seen) -> None:
        super().__init__(llm.engine.runner)
        self._blocks = llm.engine.stages.scheduler.blocks
        self._seen = seen
        self._length: dict[str, int] = {}
        self._padded_length = 0

    def verify(self, batch: ScheduledBatch, drafts: DraftBatch) -> TargetScores:
        """Note, then score."""
        trees = iter(drafts.trees)
        rows = [(item, len(next(trees)) if item.samples else 0) for item in batch.items]
        self._seen.flat.append(sum(item.num_tokens + draft for item, draft in rows))
        self._seen.slots.append(self._blocks.counts().used)
        self._seen.real.append(sum(item.start + item.num_tokens + draft for item, draft in rows))
        drafted = [draft for _, draft in rows]
        self._seen.ragged += max(drafted) > min(drafted)
        if all(item.num_tokens == 1 for item, _ in rows):
            self._seen.decoded += sum(1 + draft for draft in drafted)
            self._seen.decoded_padded += len(rows) * (1 + max(drafted))
            grown = {item.request.id: item.request.num_output for item, _ in rows}
            self._padded_length += max(length - self._length.get(name, 0) for name, length in grown.items())
            self._length.update(grown)
            self._seen.kept += sum(grown.values())
            self._seen.kept_padded += len(rows) * self._padded_length
        return super().verify(batch, drafts)


def _measure(context: Context, size: int) -> tuple[int, Seen]:
    """Rows of a batch equal to their own plain output, and what was seen."""
    prompts, tokens = context.prompts(max(BATCHES))[:size], context.few(64, 24)
    plain = context.greedy(prompts, tokens, alone=True)
    llm = context.fresh_llm(f"ngram:k={LENGTH}", enable_prefix_caching=False, block_size=1)
    seen = Seen()
    llm.engine.stages = replace(llm.engine.stages, verifier=Watching(llm, seen))
    hook = _first_mlp(llm).register_forward_pre_hook(lambda _module, args: seen.mlp.append(int(args[0].shape[-2])))
    context.say(f"A batch of {size}")
    try:
        found = count(llm, prompts, SamplingParams(temperature=0.0, max_tokens=tokens), one_by_one=False)
    finally:
        hook.remove()
    return sum(a == b for a, b in zip(found.outputs, plain, strict=True)), seen


def _first_mlp(llm: LLM) -> torch.nn.Module:
    modules: dict[str, torch.nn.Module] = dict(llm.loaded.model.named_modules())
    for name, module in modules.items():
        if name.endswith("layers.0.mlp"):
            return module
    raise PacelineError(f"{llm.model_name} has no layers.0.mlp whose tokens could be counted.")


def _batches(context: Context) -> Iterator[Row]:
    """A batch of 8, and how the padding grows with the batch."""
    found = {size: _measure(context, size) for size in BATCHES}
    same, seen = found[max(BATCHES)]
    steps = len(seen.flat)
    note = f"greedy, fp32, {steps} steps, {seen.ragged} of them with drafts of different length"
    yield exactly("E0: rows of a batch of 8 equal to their own plain output", same, max(BATCHES), note)
    wrong = sum(a != b for a, b in zip(seen.flat, seen.mlp, strict=True))
    note = f"{sum(seen.mlp)} tokens through the MLP in {steps} steps"
    yield exactly("steps whose MLP tokens are not the sum of 1 + draft", wrong, 0, note)
    wrong = sum(a != b for a, b in zip(seen.slots, seen.real, strict=True))
    yield exactly("steps whose KV slots are not the sum of real lengths", wrong, 0, f"{max(seen.slots)} slots at most")
    yield above("control: rows had drafts of different length", seen.ragged, 0, "or nothing would be shown")
    yield from _padding(found)


def _padding(found: dict[int, tuple[int, Seen]]) -> Iterator[Row]:
    for what, ratios in (
        ("input tokens", [seen.decoded_padded / seen.decoded for _, seen in found.values()]),
        ("KV slots", [seen.kept_padded / seen.kept for _, seen in found.values()]),
    ):
        listed = ", ".join(f"{ratio:.3f} at {size}" for size, ratio in zip(found, ratios, strict=True))
        yield above(f"padded over real {what}, batch of {BATCHES[0]}", ratios[0], 1.0, f"decode steps: {listed}")
        growth = min(b / a for a, b in pairwise(ratios))
        yield above(f"padding of {what} grows with the batch", growth, 1.0, "smallest growth from one size to the next")


run = suite(_batches)
