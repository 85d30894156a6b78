"""Length policies by name. A new policy is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from paceline.errors import SpeculationSpecError
from paceline.plan.auto import AutoLength
from paceline.plan.base import DrafterLimits, LengthPolicy
from paceline.plan.fixed import FixedLength
from paceline.plan.step_time import StepTime
from paceline.plan.survival import AcceptanceEstimates

Measure = Callable[[], StepTime]
POLICIES: dict[str, Callable[[Sequence[DrafterLimits], AcceptanceEstimates, Measure], LengthPolicy]] = {
    "auto": lambda drafters, estimates, measure: AutoLength(drafters, estimates, measure()),
    "fixed": lambda drafters, estimates, _: FixedLength(drafters, estimates),
}


def check_policy(name: str, options: Mapping[str, str]) -> None:
    """Refuse what no policy knows.

    Raises:
        SpeculationSpecError: an unknown policy, or an option it does not take.
    """
    if name not in POLICIES:
        raise SpeculationSpecError(
            f"unknown policy {name!r}.", field="speculation", fix=f"Known policies: {', '.join(POLICIES)}."
        )
    unknown = sorted(set(options) - ({"k"} if name == "fixed" else set()))
    if unknown:
        raise SpeculationSpecError(f"policy {name} has no option {unknown[0]!r}.", field="speculation")


def create_policy(
    name: str, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, measure: Measure
) -> LengthPolicy:
    """A policy that `check_policy` knows; `measure` is called only if it needs step times."""
    return POLICIES[name](drafters, estimates, measure)
