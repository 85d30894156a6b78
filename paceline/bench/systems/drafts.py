"""Draft models made on the spot: the target itself with layers left out, and no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from paceline.model.loader import LoadedModel, quiet

_FIRST, _SHARE = 0.4, 2 / 15
"""Where the block begins that a model misses least, and its size: layers 12 to 15 of 30. Measured on SmolLM2-135M:
sum min(p, q) is 0.55 without them, 0.33 without 8 layers, and about 0 with every second or fourth layer only."""


def save_dropped(loaded: LoadedModel, folder: Path, every: int = 2) -> Path:
    """Save a model that keeps every `every`-th layer of `loaded` (and the last)."""
    count = int(loaded.config.num_hidden_layers)
    return _save(loaded, folder, sorted({*range(0, count, every), count - 1}))


def save_without_middle(loaded: LoadedModel, folder: Path) -> Path:
    """Save a model that lacks a block of middle layers: it agrees with `loaded` about every other time."""
    return save_without(loaded, folder, max(1, round(_SHARE * int(loaded.config.num_hidden_layers))))


def save_without(loaded: LoadedModel, folder: Path, layers: int) -> Path:
    """Save a model that lacks so many layers in the middle."""
    count = int(loaded.config.num_hidden_layers)
    first = round(_FIRST * count)
    return _save(loaded, folder, [layer for layer in range(count) if not first <= layer < first + layers])


def _save(loaded: LoadedModel, folder: Path, kept: Sequence[int]) -> Path:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.float32)
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
        model.config.num_hidden_layers = len(kept)
        model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder
