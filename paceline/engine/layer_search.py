"""Which layers a model can draft without: searched for once per model, and remembered.

The likeliest next tokens of the whole model over a short text are the reference. Layers are taken out one after the
other, always the one whose loss costs least agreement with it, and of all the models on the way the one is taken that
would bring most tokens per second: with agreement `a` (as the acceptance), a forward that takes `c` times the
target's, and the best length n, (1 - a^(n + 1)) / (1 - a) tokens in n * c + 1 forwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.arrays import IntArray
from paceline.cache.block_manager import BlockManager
from paceline.draft.kv_budget import Choice, worth
from paceline.errors import ConfigError
from paceline.model.loader import LoadedModel
from paceline.model.path import ForwardPath
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput
from paceline.model.store import paceline_home

logger = logging.getLogger(__name__)
TEXT = (
    "Question: How do I keep bread fresh for a few days?\nAnswer: Let it cool completely, then wrap it in a cotton "
    "cloth and put it in a closed box at room temperature. A refrigerator makes it stale sooner. If you bake more than "
    "you need, cut the rest into slices and freeze them; each slice thaws in a few minutes.\n\n"
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\n"
    "The town lies on the eastern bank of the river. It was founded in the twelfth century as a place where traders "
    "could cross, and for a long time the bridge was the only one between the mountains and the sea. Today most people "
    "who live there work in the paper mill or in one of the schools.\n\n"
    "Question: A shop sells pens at 3 for 2 dollars. How much do 12 pens cost?\nAnswer: 12 pens are 4 times 3 pens, "
    "and 4 times 2 dollars is 8 dollars. The answer is 8."
)
_MOST_TOKENS = 256
_AT_A_TIME = 2
"""Layers that a sweep takes out."""
_LEAST_LAYERS = 4
_REPEATS = 5
_LONGEST = 8


def best_layers(
    loaded: LoadedModel, runner: ModelRunner, blocks: BlockManager, on_progress: Callable[[str], None]
) -> tuple[int, ...]:
    """The layers to skip: remembered, or searched for now and remembered."""
    path = _file(loaded, runner)
    try:
        if path.exists():
            known = tuple(int(layer) for layer in json.loads(path.read_text(encoding="utf-8"))["skip"])
            ForwardPath.without(runner.kv.shape.num_layers, known)
            return known
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        logger.warning("the layers remembered in %s cannot be used (%s); searching again", path, error)
    tokens = list(loaded.tokenizer.encode(TEXT))[:_MOST_TOKENS]
    found = search(runner, blocks, tokens, lambda done, all_: on_progress(f"choosing layers to skip ({done}/{all_})"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model": loaded.name, "skip": found}), encoding="utf-8")
    except OSError as error:
        logger.info("the layers to skip cannot be kept in %s (%s)", path.parent, error)
    return found


def search(
    runner: ModelRunner, blocks: BlockManager, tokens: Sequence[int], on_progress: Callable[[int, int], None]
) -> tuple[int, ...]:
    """Search now.

    Args:
        runner: the model.
        blocks: its block manager, from which the text takes blocks for the time of the search.
        tokens: a text.
        on_progress: gets sweeps done and to do.
    """
    num_layers = runner.kv.shape.num_layers
    table: list[int] = []
    tokens = tokens[: blocks.num_available * blocks.block_size - 1]
    blocks.grow(table, len(tokens) + 1)
    try:
        trial = _Trial(runner, table, tokens)
        whole = trial.seconds(())
        skipped: tuple[int, ...] = ()
        best, best_worth = skipped, 1.0 / whole
        sweeps = max(num_layers - _LEAST_LAYERS, 0) // _AT_A_TIME
        for sweep in range(sweeps):
            rest = [layer for layer in range(num_layers) if layer not in skipped]
            agreements = {layer: trial.agreement((*skipped, layer)) for layer in rest}
            order = sorted(rest, key=lambda layer: (-agreements[layer], layer))
            skipped = tuple(sorted((*skipped, *order[:_AT_A_TIME])))
            agreement = trial.agreement(skipped)
            made = Choice("", accepted=agreement * len(tokens), tested=len(tokens), seconds=trial.seconds(skipped))
            found = worth(made, whole, _LONGEST)
            if found > best_worth:
                best, best_worth = skipped, found
            on_progress(sweep + 1, sweeps)
            if agreement < 0.1:
                break
        return best
    finally:
        blocks.release(table)


class _Trial:
    """The text under parts of the model."""

    def __init__(self, runner: ModelRunner, table: Sequence[int], tokens: Sequence[int]) -> None:
        self._runner, self._table, self._tokens = runner, table, tokens
        self._reference = self._likeliest(None)

    def agreement(self, skipped: Sequence[int]) -> float:
        """Share of positions whose likeliest token stays the same."""
        found = self._likeliest(self._path(skipped))
        return float((found == self._reference).mean())

    def seconds(self, skipped: Sequence[int]) -> float:
        """The shortest of some forwards over one token behind the text."""
        n = len(self._tokens)
        one = SequenceInput([self._tokens[-1]], np.array([n]), n, self._table)
        times = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            self._runner.forward(ForwardBatch((one,), [0], self._path(skipped)))
            times.append(time.perf_counter() - started)
        return min(times)

    def _path(self, skipped: Sequence[int]) -> ForwardPath:
        return ForwardPath.without(self._runner.kv.shape.num_layers, skipped)

    def _likeliest(self, path: ForwardPath | None) -> IntArray:
        n = len(self._tokens)
        text = SequenceInput(self._tokens, np.arange(n), 0, self._table)
        return self._runner.forward(ForwardBatch((text,), range(n), path)).argmax(dim=-1).cpu().numpy()


def _file(loaded: LoadedModel, runner: ModelRunner) -> Path:
    """By architecture, number format and weights (told apart by their last norm)."""
    config: Any = loaded.config
    model: Any = runner.model
    weights = model.model.norm.weight.detach().float().cpu()
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(str(loaded.dtype).encode() + torch.Tensor.numpy(weights).tobytes())
    return paceline_home() / "layers" / f"{digest.hexdigest()[:24]}.json"
