"""Acceptance rules by name. A new rule is one file and one line here."""

from __future__ import annotations

from paceline.errors import ConfigError
from paceline.verify.base import AcceptanceRule
from paceline.verify.coupled import CoupledRule
from paceline.verify.multi import MultiRule
from paceline.verify.recursive import RecursiveRule
from paceline.verify.rejection import RejectionRule

RULES: dict[str, type[AcceptanceRule]] = {
    "coupled": CoupledRule,
    "rejection": RejectionRule,
    "recursive": RecursiveRule,
    "multi": MultiRule,
}


def create_rule(name: str) -> AcceptanceRule:
    """The rule of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RULES:
        raise ConfigError(f"unknown rule {name!r}.", field="rule", fix=f"Known rules: {', '.join(RULES)}.")
    return RULES[name]()
