"""S3D (2405.20314): one pass through the bottom and the top layers drafts several tokens. Here untrained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from paceline.bench.systems.base import Row, above, at_most, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.layer_paths import agreement, kept, rows, texts
from paceline.bench.systems.measures import greedy_identity
from paceline.model.runner import ForwardBatch, SequenceInput

_SWEEP = (0.4, 0.6, 0.8, 0.9)
"""Shares of the layers that are kept."""
_MASKS = 3


def _ends(num_layers: int, count: int) -> list[int]:
    """As many at the bottom as at the top."""
    bottom = count // 2
    return [*range(bottom), *range(num_layers - (count - bottom), num_layers)]


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield greedy_identity(context, context.llm("s3d:k=2"))[0]


def _untouched(context: Context) -> Iterator[Row]:
    """The whole path's logits, before and after a pass along another one."""
    engine = context.llm().engine
    blocks, table = engine.stages.scheduler.blocks, list[int]()
    tokens = context.prompts(1)[0]
    layers = engine.runner.kv.shape.num_layers
    assert blocks.grow(table, len(tokens))
    try:
        text = SequenceInput(tokens, np.arange(len(tokens)), 0, table)
        before = engine.runner.forward(ForwardBatch((text,), range(len(tokens)))).clone()
        engine.runner.forward(ForwardBatch((text,), [0], kept(layers, _ends(layers, 4))))
        after = engine.runner.forward(ForwardBatch((text,), range(len(tokens))))
        same = float((before == after).float().mean())
    finally:
        blocks.release(table)
    yield exactly("logits of the whole path that keep their bits", same, 1.0, f"{before.numel()} logits")


def _sweep(context: Context) -> Iterator[Row]:
    """Agreement by layers kept, and where they are taken out."""
    layers = context.llm().engine.runner.kv.shape.num_layers
    counts = sorted({max(round(share * layers), 2) for share in _SWEEP})
    found = [agreement(context, kept(layers, _ends(layers, count))) for count in counts]
    shown = ", ".join(f"{count}: {share:.3f}" for count, share in zip(counts, found, strict=True))
    note = f"share of likeliest tokens that stay, by layers kept of {layers}: {shown}"
    yield above("agreement rises with the layers kept, least step", min(b - a for a, b in pairwise(found)), 0.0, note)
    count = counts[-2]
    top = agreement(context, kept(layers, range(count)))
    note = f"{count} layers kept: {found[-2]:.3f} without the middle, {top:.3f} without the top"
    yield above("skipping the middle over skipping the top", found[-2] - top, 0.0, note)


def _masks(context: Context) -> Iterator[Row]:
    """What untrained masks add."""
    layers = context.llm().engine.runner.kv.shape.num_layers
    path = kept(layers, _ends(layers, max(round(0.8 * layers), 2)))
    mask = context.llm().engine.eos_token_ids[0]
    hits, alone = [], []
    for text in texts(context):
        drafted = rows(context, text, path, _MASKS, mask).argmax(-1)  # [places, 1 + masks]
        truth = torch.tensor(text.tokens[text.prompt_len :])
        right = torch.stack(
            [drafted[: len(truth) - _MASKS, i] == truth[i : len(truth) - _MASKS + i] for i in range(1 + _MASKS)], dim=1
        )
        hits.append(1.0 + right.cumprod(dim=1).sum(dim=1).float())
        alone.append(1.0 + right[:, 0].float())
    with_masks, single = float(torch.cat(hits).mean()), float(torch.cat(alone).mean())
    note = (
        f"accepted length {with_masks:.3f} with {_MASKS} masks, {single:.3f} with one token: training is what it lacks"
    )
    yield at_most("untrained masks add to the accepted length", with_masks - single, 0.1, note)


run = suite(_identity, _untouched, _sweep, _masks)
