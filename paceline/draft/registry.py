"""Drafters by name. A new drafter is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from paceline.draft.guessers.registry import create_guesser
from paceline.draft.layers import parse_layers
from paceline.draft.retrievers.registry import check_retriever
from paceline.errors import SpeculationSpecError

if TYPE_CHECKING:  # `--help` lists the drafters, and PyTorch would hold it up
    from paceline.draft.base import Drafter


@dataclass(frozen=True, slots=True)
class DrafterEntry:
    """Where a drafter lives and what it takes.

    `options` maps the spec's keys to their types; `needs` names what the engine hands over at construction.
    """

    path: str
    most: int
    """Default cap of its length under a planning policy."""
    options: Mapping[str, Callable[[str], Any]]
    needs: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    """Options that must be given."""
    whole_context: bool = False
    """Whether it needs a target without sliding windows; `auto` does without it otherwise."""

    @property
    def has_model(self) -> bool:
        """Whether a draft model has to be loaded for it, named by its option `model`."""
        return "runner" in self.needs

    @property
    def drafts_in_shapes(self) -> bool:
        """Whether its trees grow in the shape that the engine is told."""
        return "shape" in self.needs


_DRAFT_MODEL = ("runner", "blocks", "vocab_size", "coupled", "shape", "stop_ids", "max_model_len")
_TARGET = ("target", "vocab_size", "coupled", "shape", "stop_ids")
DRAFTERS: dict[str, DrafterEntry] = {
    "grammar": DrafterEntry("paceline.draft.grammar:GrammarDrafter", 32, {}),
    "ngram": DrafterEntry("paceline.draft.ngram:NgramDrafter", 16, {"lookup_max": int, "lookup_min": int}),
    "prediction": DrafterEntry("paceline.draft.prediction:PredictionDrafter", 32, {}),
    "recycling": DrafterEntry("paceline.draft.recycling:RecyclingDrafter", 32, {}, ("vocab_size", "chain")),
    "suffix": DrafterEntry("paceline.draft.suffix:SuffixDrafter", 64, {"tokens": int}, ("chain",)),
    "draft": DrafterEntry(
        "paceline.draft.model_drafter:ModelDrafter",
        8,
        {"model": str, "vocab": str, "guess": create_guesser},
        _DRAFT_MODEL,
        required=("model",),
    ),
    "easyspec": DrafterEntry(
        "paceline.draft.easyspec:EasySpecDrafter",
        8,
        {"model": str, "vocab": str, "group": int, "calibrate": int},
        _DRAFT_MODEL,
        required=("model",),
    ),
    "layerskip": DrafterEntry(
        "paceline.draft.layerskip:LayerSkipDrafter", 8, {"skip": parse_layers}, (*_TARGET, "best_layers")
    ),
    "magicdec": DrafterEntry(
        "paceline.draft.magicdec:MagicDecDrafter",
        8,
        {"budget": int, "select": str, "sinks": int},
        _TARGET,
        whole_context=True,
    ),
    "ouroboros": DrafterEntry(
        "paceline.draft.ouroboros:OuroborosDrafter",
        24,
        {"model": str, "vocab": str, "phrases": int, "suffixes": int, "feed": int, "reuse": int},
        (*_DRAFT_MODEL, "chain"),
        required=("model",),
    ),
    "rapid": DrafterEntry(
        "paceline.draft.rapid:RapidDrafter",
        8,
        {
            "model": str,
            "vocab": str,
            "start": int,
            "chunk": int,
            "budget": int,
            "question": int,
            "retriever": check_retriever,
            "embedder": str,
            "transfer": float,
        },
        (*_DRAFT_MODEL, "tokenizer"),
        required=("model",),
    ),
    "s3d": DrafterEntry("paceline.draft.s3d:S3dDrafter", 4, {"ends": int, "mask": int}, _TARGET),
}


def entry(name: str) -> DrafterEntry:
    """The entry of a drafter.

    Raises:
        SpeculationSpecError: there is none of that name.
    """
    if name not in DRAFTERS:
        raise SpeculationSpecError(
            f"unknown drafter {name!r}.",
            field="speculation",
            fix=f"Known drafters: {', '.join(sorted(DRAFTERS))}.",
        )
    return DRAFTERS[name]


def parse_options(name: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Typed options of a drafter.

    Raises:
        SpeculationSpecError: an unknown key, a value of the wrong type, or an option that is missing.
    """
    known = entry(name).options
    for key in entry(name).required:
        if key not in options:
            raise SpeculationSpecError(
                f"drafter {name} needs a {key}.",
                field="speculation",
                fix=f"Write {name}:{key}=PATH_OR_NAME.",
            )
    parsed: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            extra = ", ".join(("k", "max", *sorted(known)))
            raise SpeculationSpecError(
                f"drafter {name} has no option {key!r}.", field="speculation", fix=f"It takes: {extra}."
            )
        try:
            parsed[key] = known[key](value)
        except ValueError as error:
            numbers: dict[object, str] = {int: "is not a whole number", float: "is not a number"}
            why = numbers.get(known[key], f"cannot be read: {error}")
            raise SpeculationSpecError(f"{name}:{key}={value!r} {why}.", field="speculation") from error
    return parsed


def create(name: str, options: Mapping[str, Any], supplies: Mapping[str, Any]) -> Drafter:
    """Build a drafter from its own options and what the engine supplies."""
    found = entry(name)
    module, _, attribute = found.path.partition(":")
    drafter: Drafter = getattr(import_module(module), attribute)(
        **options, **{need: supplies[need] for need in found.needs}
    )
    return drafter
