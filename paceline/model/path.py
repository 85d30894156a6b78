"""A forward through some of a model's layers, or through groups of layers that attend side by side.

Drafting from the target itself takes such forwards: layers are skipped (S3D 2405.20314), or the attentions of a group
all start from the group's entry (EasySpec 2502.02493). In a group of layers i with entry h

    a_i = attention_i(norm_i(h))          for all of them
    x = h;  then in order  x += a_i;  x += mlp_i(norm_i'(x))

so a group of one is the layer as it is. Every layer that runs writes its keys and values where it always does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from paceline.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Models whose layers are alike enough: one kind of rotary embedding, `x + attention`, then `x + mlp`."""


@dataclass(frozen=True, slots=True)
class ForwardPath:
    """Layers in the order in which they run, by group."""

    groups: tuple[tuple[int, ...], ...]

    @staticmethod
    def without(num_layers: int, skipped: Collection[int]) -> ForwardPath:
        """All layers but some.

        Raises:
            ConfigError: nothing is left, or there is no such layer.
        """
        for layer in skipped:
            if not 0 <= layer < num_layers:
                raise ConfigError(
                    f"there is no layer {layer} to skip; the model has 0 to {num_layers - 1}.", field="speculation"
                )
        kept = [layer for layer in range(num_layers) if layer not in skipped]
        if not kept:
            raise ConfigError("every layer is skipped.", field="speculation", fix="Leave some.")
        return ForwardPath(tuple((layer,) for layer in kept))

    @staticmethod
    def in_groups(num_layers: int, size: int) -> ForwardPath:
        """First and last layer alone, the others in groups of `size` (the last group may be smaller)."""
        middle = range(1, max(num_layers - 1, 1))
        groups = [tuple(middle[i : i + size]) for i in range(0, len(middle), size)]
        ends = [(0,)] if num_layers == 1 else [(0,), (num_layers - 1,)]
        return ForwardPath((ends[0], *groups, *ends[1:]))


def check_family(model_type: str | None, method: str) -> None:
    """Refuse a model whose layers cannot be skipped or grouped.

    Raises:
        ConfigError: it is none of `FAMILIES`.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{method} cannot run part of a {model_type} model.",
            field="speculation",
            fix=f"It knows {', '.join(FAMILIES)}; choose another drafter for this model.",
        )
