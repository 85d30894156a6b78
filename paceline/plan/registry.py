"""Length policies by name. A new policy is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def create_policy(
    name: str, drafters: Sequence[DrafterLimits], estimates: AcceptanceEstimates, measure: Measure
) -> LengthPolicy:
    """The policy of that name; `measure` is called only if it needs step times.

    Raises:
        SpeculationSpecError: there is none.
    """
    if name not in POLICIES:
        raise SpeculationSpecError(
            f"unknown policy {name!r}.", field="speculation", fix=f"Known policies: {', '.join(POLICIES)}."
        )
    return POLICIES[name](drafters, estimates, measure)
