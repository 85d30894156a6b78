"""How often parts of the target agree with it, along texts that it wrote itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.bench.systems.context import Context
from paceline.model.path import ForwardPath
from paceline.model.runner import ForwardBatch, SequenceInput

PROMPTS, TOKENS = (6, 2), (32, 16)


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the target's greedy answer."""

    tokens: tuple[int, ...]
    prompt_len: int


def texts(context: Context) -> list[Text]:
    """The same for all tests."""
    prompts = context.prompts(context.few(*PROMPTS))
    answers = context.greedy(prompts, context.few(*TOKENS))
    return [Text((*prompt, *answer), len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def rows(context: Context, text: Text, path: ForwardPath | None, masks: int = 0, mask: int = 0) -> torch.Tensor:
    """Logits at every answer token's place, and of mask tokens behind each if there are any.

    Context tokens pass through all layers first, as a target's cache has them; then what is drafted takes the path.

    Returns:
        One row for each place, or one for each mask and place.  # [places, vocab] or [places, 1 + masks, vocab]
    """
    engine = context.llm().engine
    blocks = engine.stages.scheduler.blocks
    table: list[int] = []
    assert blocks.grow(table, len(text.tokens) + masks)
    try:
        whole = SequenceInput(text.tokens, np.arange(len(text.tokens)), 0, table)
        places = range(text.prompt_len - 1, len(text.tokens) - 1)
        exact = engine.runner.forward(ForwardBatch((whole,), list(places)))
        if path is None:
            return exact.clone()
        found = []
        for place in reversed(places):  # its own cache places are the only ones that are written, and not read again
            new = [text.tokens[place], *[mask] * masks]
            asked = SequenceInput(new, place + np.arange(len(new)), place, table)
            found.append(engine.runner.forward(ForwardBatch((asked,), list(range(len(new))), path)).clone())
        stacked = torch.stack(found[::-1])
        return stacked if masks else stacked[:, 0]
    finally:
        blocks.release(table)


def agreement(context: Context, path: ForwardPath) -> float:
    """Share of the places at which a path has the same likeliest token as the target."""
    found = [
        (rows(context, text, path).argmax(-1) == rows(context, text, None).argmax(-1)).float()
        for text in texts(context)
    ]
    return float(torch.cat(found).mean())


def kept(num_layers: int, kept_layers: Sequence[int]) -> ForwardPath:
    """The path of these layers."""
    return ForwardPath.without(num_layers, [i for i in range(num_layers) if i not in kept_layers])
