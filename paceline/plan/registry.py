"""Length policies by name. A new policy is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from paceline.errors import SpeculationSpecError
from paceline.plan.base import DrafterLimits, LengthPolicy
from paceline.plan.cost_model import CostModel
from paceline.plan.survival import AcceptanceEstimates


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 10.0:
        raise ValueError("must be between 0 and 10")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError("must be between 0 and 1")
    return value


def _head(kind: str) -> Callable[[str], Any]:
    """Reads a head's folder, so that a damaged one is found before any model is loaded."""

    def load(text: str) -> Any:
        from paceline.plan.heads import load_head

        return load_head(text, kind)

    return load


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """Where a policy lives and what it takes and needs."""

    path: str
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    priced: bool = False
    """Whether it needs the cost model."""
    required: Mapping[str, str] = field(default_factory=dict)
    """Options that must be given, and how to come by a value."""
    stops_drafts: bool = False
    """Whether all it does is to end drafts of a draft model early."""


_TRAIN = "paceline train acceptance-head MODEL --draft DRAFT --out RUN"

POLICIES: dict[str, PolicyEntry] = {
    "auto": PolicyEntry("paceline.plan.goodput:GoodputLength", {"share": _share, "protect": _share}, priced=True),
    "bass": PolicyEntry("paceline.plan.bass:BassLength"),
    "decision": PolicyEntry(
        "paceline.plan.decision:DecisionLength",
        {"head": _head("decision"), "p": _probability},
        required={"head": f"{_TRAIN} --kind decision"},
        stops_drafts=True,
    ),
    "fixed": PolicyEntry("paceline.plan.fixed:FixedLength"),
    "heuristic": PolicyEntry("paceline.plan.heuristic:HeuristicLength"),
    "sequoia": PolicyEntry("paceline.plan.sequoia:SequoiaLength", priced=True),
    "smartspec": PolicyEntry("paceline.plan.smartspec:SmartSpec", priced=True),
    "smartspec-request": PolicyEntry("paceline.plan.smartspec_request:SmartSpecPerRequest", priced=True),
    "specdec++": PolicyEntry(
        "paceline.plan.specdec:SpecDecLength",
        {"head": _head("acceptance"), "h": _probability},
        required={"head": _TRAIN},
        stops_drafts=True,
    ),
    "svip": PolicyEntry("paceline.plan.svip:SvipLength", {"h": _share, "c": _share}, stops_drafts=True),
    "threshold": PolicyEntry("paceline.plan.threshold:ThresholdLength", {"p": _probability}),
}


def check_policy(name: str, options: Mapping[str, str]) -> dict[str, Any]:
    """The typed options of a policy.

    Raises:
        SpeculationSpecError: an unknown policy, an option it does not take or needs, or a value it cannot have.
        ModelError: a head that it names cannot be used.
    """
    if name not in POLICIES:
        raise SpeculationSpecError(
            f"unknown policy {name!r}.", field="speculation", fix=f"Known policies: {', '.join(POLICIES)}."
        )
    known = POLICIES[name].options
    parsed: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            fix = f"It takes: {', '.join(known)}." if known else "It takes none."
            raise SpeculationSpecError(f"policy {name} has no option {key!r}.", field="speculation", fix=fix)
        try:
            parsed[key] = known[key](value)
        except ValueError as error:
            raise SpeculationSpecError(f"policy {name}: {key}={value} is impossible ({error}).") from error
    for key, command in POLICIES[name].required.items():
        if key not in parsed:
            raise SpeculationSpecError(
                f"policy {name} needs {key}=FOLDER.",
                field="speculation",
                fix=f"Write @{name}:{key}=RUN/{key} after `{command}`.",
            )
    return parsed


def create_policy(
    name: str,
    options: Mapping[str, Any],
    drafters: Sequence[DrafterLimits],
    estimates: AcceptanceEstimates,
    cost: Callable[[], CostModel],
) -> LengthPolicy:
    """A policy that `check_policy` knows, with its typed options; `cost` is called only if it needs step times."""
    entry = POLICIES[name]
    module, _, attribute = entry.path.partition(":")
    more = (cost(),) if entry.priced else ()
    policy: LengthPolicy = getattr(import_module(module), attribute)(drafters, estimates, *more, **options)
    return policy
