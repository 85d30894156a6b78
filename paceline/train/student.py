"""Stage 2: a student made of some of the target's layers."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError, UnsupportedModelError
from paceline.model.draft_weights import build_on_target, own_parameters
from paceline.model.loader import LoadedModel
from paceline.train.attention import use_library_attention

_LAYER = re.compile(r"(.*\b(?:layers|h)\.)(\d+)(\..*)")


def choose_layers(wanted: str, num_layers: int) -> tuple[int, ...]:
    """`4` is that many, evenly spread with the first and the last among them; `0,9,19,29` is just those.

    Raises:
        ConfigError: no such layers.
    """
    try:
        numbers = [int(part) for part in wanted.split(",")]
    except ValueError:
        raise ConfigError(f"is {wanted!r}; give a count (4) or a list (0,9,19,29).", field="layers") from None
    if "," in wanted:
        if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= num_layers:
            raise ConfigError(f"is {wanted}; give rising numbers from 0 to {num_layers - 1}.", field="layers")
        return tuple(numbers)
    if not 1 <= numbers[0] <= num_layers:
        raise ConfigError(f"is {wanted}, and the target has {num_layers} layers.", field="layers")
    return tuple(int(i) for i in np.linspace(0, num_layers - 1, numbers[0]).round())


def student_config(target_config: Any, layers: tuple[int, ...], intermediate: int | None = None) -> Any:
    """The target's config with these layers only; `intermediate` widens their MLPs.

    Raises:
        ConfigError: the MLPs cannot be widened to that.
    """
    config = copy.deepcopy(target_config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [i for i, layer in enumerate(layers) if layer in config.mlp_only_layers]
    if intermediate is not None:
        width = getattr(config, "intermediate_size", None)
        if width is None or intermediate < width:
            raise ConfigError(f"is {intermediate}, and the target's MLPs have {width}.", field="intermediate")
        config.intermediate_size = intermediate
    return config


@torch.no_grad()
def make_student(
    target: LoadedModel, layers: tuple[int, ...], *, intermediate: int | None = None, seed: int = 0
) -> Any:
    """A trainable fp32 student on the target's frozen embedding and head.

    New neurons of a widened MLP read at random and write nothing yet, so that widening alone changes no output.

    Raises:
        UnsupportedModelError: the target's layers cannot be taken out one by one.
    """
    target.model.requires_grad_(False)
    config = student_config(target.config, layers, intermediate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_on_target(
            config,
            target.model,
            dtype=torch.float32,
            device=target.device,
            attention=use_library_attention(target.model),
        )
    source = own_parameters(target.model)
    for name, parameter in own_parameters(student).items():
        found = _LAYER.fullmatch(name)
        origin = f"{found[1]}{layers[int(found[2])]}{found[3]}" if found else name
        if origin not in source or source[origin].dim() != parameter.dim():
            raise UnsupportedModelError(
                f"{origin} of the target does not fit layer weights {name} of the student.", field=target.name
            )
        _copy_into(parameter, source[origin])
        parameter.requires_grad_(True)
    return student.eval()  # no dropout: the same data in the same order gives the same weights


def _copy_into(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy what there is; further inputs of a wider layer get weight 0, further outputs keep their random weights."""
    corner = tuple(slice(size) for size in value.shape)
    if parameter.dim() == 2 and parameter.shape[1] > value.shape[1]:
        parameter[:, value.shape[1] :] = 0.0
    parameter[corner].copy_(value)
