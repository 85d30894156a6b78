"""Tree shapes of draft models by name. A new shape is one file and one line here.

TREE = name [":" key "=" value ("," key "=" value)*]        widths of levels are written 3/2/1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from paceline.draft.shapes.base import TreeShape
from paceline.engine.draft_tree import Origin
from paceline.errors import ConfigError

AUTO = "auto"
"""Each drafter's own shape."""


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("/"))


@dataclass(frozen=True, slots=True)
class ShapeEntry:
    """Where a shape lives and the options it takes."""

    path: str
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)


SHAPES: dict[str, ShapeEntry] = {
    "chain": ShapeEntry("paceline.draft.shapes.chain:ChainShape"),
    "branching": ShapeEntry("paceline.draft.shapes.branching:BranchingShape", {"widths": _widths}),
    "k-ary": ShapeEntry("paceline.draft.shapes.branching:KaryShape", {"k": int}),
    "best-first": ShapeEntry("paceline.draft.shapes.best_first:BestFirstShape", {"expand": int, "width": int}),
    "rsd-c": ShapeEntry("paceline.draft.shapes.branching:ConstantBranchingShape", {"widths": _widths}),
    "rsd-s": ShapeEntry("paceline.draft.shapes.stochastic_beam:StochasticBeamShape", {"width": int}),
    "sequoia": ShapeEntry("paceline.draft.shapes.sequoia:SequoiaShape"),
    "cape": ShapeEntry("paceline.draft.shapes.cape:CapeShape"),
}


@dataclass(frozen=True, slots=True)
class TreeSpec:
    """A parsed tree setting; `name` may be `auto`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def branches(self) -> bool:
        """Whether it asks for more than a chain."""
        return self.name not in (AUTO, "chain")


def parse_tree(text: str) -> TreeSpec:
    """Read a tree setting.

    Raises:
        ConfigError: an unknown shape or option, or a value it cannot have; the message lists what there is.
    """
    name, colon, rest = text.strip().partition(":")
    if name == AUTO and not colon:
        return TreeSpec(AUTO)
    if name not in SHAPES:
        known = ", ".join((AUTO, *SHAPES))
        raise ConfigError(f"unknown tree {name!r}.", field="tree", fix=f"Known trees: {known}.")
    known_options = SHAPES[name].options
    options: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        key, _, value = item.partition("=")
        if key.strip() not in known_options:
            fix = f"It takes: {', '.join(known_options)}." if known_options else "It takes none."
            raise ConfigError(f"tree {name} has no option {key.strip()!r}.", field="tree", fix=fix)
        try:
            options[key.strip()] = known_options[key.strip()](value.strip())
        except ValueError as error:
            raise ConfigError(f"tree {name}: {item!r} cannot be read.", field="tree") from error
    return TreeSpec(name, options)


def create_shape(spec: TreeSpec, origin: Origin) -> TreeShape:
    """The shape of a draft model; `auto` is a chain.

    Raises:
        ConfigError: an option is impossible, or the shape cannot be drawn as the rule needs it.
    """
    entry = SHAPES["chain" if spec.name == AUTO else spec.name]
    module, _, attribute = entry.path.partition(":")
    shape: TreeShape = getattr(import_module(module), attribute)(origin, **spec.options)
    return shape
