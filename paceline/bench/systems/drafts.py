"""Draft models made on the spot: the target itself with layers left out."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from paceline.model.loader import LoadedModel


def save_dropped(loaded: LoadedModel, folder: Path, every: int = 2) -> Path:
    """Save a model that keeps every `every`-th layer of `loaded` (and the last)."""
    model = AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.float32)
    layers = model.model.layers
    kept = sorted({*range(0, len(layers), every), len(layers) - 1})
    model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder
