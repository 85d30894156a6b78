"""How layers are named in a speculation setting."""

from __future__ import annotations

import re


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers from `3`, `3-7` or `3-7,9`.

    Raises:
        ValueError: it reads differently.
    """
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None:
            raise ValueError(f"{part!r} is not a layer or a range of them")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"{part!r} is an empty range")
        layers.extend(range(first, last + 1))
    return tuple(layers)
