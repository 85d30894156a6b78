"""What can be checked of the options about speculation before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paceline.config import EngineConfig
from paceline.draft import registry as drafters
from paceline.draft.shapes.base import TreeShape
from paceline.draft.shapes.registry import TreeSpec, create_shape, parse_tree
from paceline.engine.draft_tree import Origin
from paceline.errors import ConfigError, SpeculationSpecError
from paceline.plan.registry import POLICIES, check_policy
from paceline.plan.spec import SpeculationSpec, parse_speculation
from paceline.verify.base import AcceptanceRule
from paceline.verify.registry import RULES, create_rule


@dataclass(frozen=True, slots=True)
class Speculation:
    """A checked speculation setting."""

    spec: SpeculationSpec
    rule: AcceptanceRule
    chain: bool
    """Whether every drafter must propose chains."""
    shape: TreeShape
    """Of a draft model's trees."""
    policy_options: Mapping[str, Any]


def check_speculation(config: EngineConfig) -> Speculation:
    """Parse and check everything about speculation that needs no model.

    Raises:
        SpeculationSpecError: the spec cannot be read, names an unknown drafter, policy or option, or a policy that
            could do nothing for its drafters.
        ConfigError: an unknown rule or tree, a rule that the tree forbids, or a tree that nobody would grow.
    """
    spec = parse_speculation(config.speculation)
    rule = create_rule(config.rule)
    tree = parse_tree(config.tree)
    shape = _shape(tree, rule)
    named = spec.drafters if spec.text != "auto" else ()  # whose choice of drafters is not to be relied upon
    if tree.branches and not any(drafters.entry(d.name).drafts_in_shapes for d in named):
        raise ConfigError(
            f"{tree.name} is a shape for a draft model, and speculation {config.speculation} has none.",
            field="tree",
            fix=f"Leave --tree out, or {'add +' if named else 'write '}draft:model=NAME in --speculation.",
        )
    for drafter in spec.drafters:
        drafters.parse_options(drafter.name, drafter.options)
    options = check_policy(spec.policy, spec.policy_options) if spec.drafters else {}
    _check_stops(spec)
    return Speculation(spec, rule, tree.name == "chain" or rule.branches is None, shape, options)


def _shape(tree: TreeSpec, rule: AcceptanceRule) -> TreeShape:
    shape = create_shape(tree, rule.branches or Origin.DISTINCT)
    if tree.branches and rule.branches is None:
        raise ConfigError(
            f"rule {rule.name} walks a chain and cannot verify a tree.",
            field="tree",
            fix=f"Use --tree chain with it, or one of the rules {', '.join(_rules_of(tree))} with the tree.",
        )
    return shape


def _rules_of(tree: TreeSpec) -> list[str]:
    """The rules for which a branching shape can be drawn."""
    found = []
    for name in RULES:
        origin = create_rule(name).branches
        try:
            if origin is not None:
                create_shape(tree, origin)
                found.append(name)
        except ConfigError:
            continue
    return found


def _check_stops(spec: SpeculationSpec) -> None:
    """A policy that only ends drafts early needs a draft model, and one whose length is not fixed."""
    models = [d for d in spec.drafters if drafters.entry(d.name).drafts_in_shapes]
    if not spec.drafters or not POLICIES[spec.policy].stops_drafts or any(d.k is None for d in models):
        return
    if models:
        length = models[0].k
        message = f"policy {spec.policy} ends drafts early, and k={length} fixes the length of {models[0].name}."
        fix = f"Write max={length} instead of k={length}, or leave the policy out."
    else:
        message = f"policy {spec.policy} ends the drafts of a draft model, and {spec.text} has none."
        fix = f"Write draft:model=NAME@{spec.policy}, or a policy that needs no draft model, such as @auto."
    raise SpeculationSpecError(message, field="speculation", fix=fix)
