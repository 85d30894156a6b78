"""Reading a speculation spec.

    SPEC    = "none" | "auto" | DRAFTER ("+" DRAFTER)* ["@" POLICY]
    DRAFTER = name [":" key "=" value ("," key "=" value)*]
    POLICY  = name [":" key "=" value ...]

`k=` fixes a drafter's length, `max=` caps it, without either the plan decides; `ngram:k=4+recycling` always verifies
the n-gram draft and lets the plan decide about the rest. Values that hold `,`, `+` or `@` are
quoted. Which drafters and options exist is checked where they are built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.errors import SpeculationSpecError

AUTO_DRAFTERS = ("grammar", "prediction", "suffix", "recycling", "magicdec")
MAX_LENGTH = 256
_FIX = "Write drafter[:key=value,...][+drafter...][@policy], for example ngram:k=4 or ngram+recycling:max=24@auto."


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """One drafter of a spec: `k` is its fixed length, `maximum` its cap, `options` its own settings."""

    name: str
    k: int | None = None
    maximum: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpeculationSpec:
    """A parsed spec. No drafters means no speculation."""

    text: str
    drafters: tuple[DrafterSpec, ...] = ()
    policy: str = "none"
    policy_options: Mapping[str, str] = field(default_factory=dict)


def parse_speculation(text: str) -> SpeculationSpec:
    """Parse a spec.

    Raises:
        SpeculationSpecError: it cannot be read; the message shows the part that is meant.
    """
    text = text.strip()
    if text == "none":
        return SpeculationSpec(text)
    if text == "auto":
        return SpeculationSpec(text, tuple(DrafterSpec(name) for name in AUTO_DRAFTERS), "auto")
    body, *policies = _split(text, "@")
    if len(policies) > 1:
        raise _error("more than one @policy", text)
    drafters = tuple(_drafter(part) for part in _split(body, "+"))
    if "none" in (d.name for d in drafters) or "auto" in (d.name for d in drafters):
        raise _error("'none' and 'auto' stand alone", text)
    if len({d.name for d in drafters}) != len(drafters):
        raise _error("a drafter is named twice", text)
    all_fixed = all(d.k is not None for d in drafters)
    policy, options = _named(policies[0]) if policies else ("fixed" if all_fixed else "auto", {})
    if policy == "fixed":
        default = options.pop("k", None)
        drafters = tuple(_with_default_k(d, default, text) for d in drafters)
    return SpeculationSpec(text, drafters, policy, options)


def from_vllm_json(text: str) -> str:
    """The spec equivalent to vLLM's `--speculative-config` JSON.

    Raises:
        SpeculationSpecError: not JSON, or a method or key we have no counterpart for.
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpeculationSpecError(f"is not JSON: {error}.", field="speculative-config") from error
    if not isinstance(config, dict):
        raise SpeculationSpecError("must be a JSON object.", field="speculative-config")
    known = {"method", "model", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"}
    unknown = sorted(set(config) - known)
    if unknown:
        raise SpeculationSpecError(
            f"unknown key(s) {', '.join(unknown)}.",
            field="speculative-config",
            fix=f"Known keys: {', '.join(sorted(known))}.",
        )
    method = config.get("method", "draft_model" if "model" in config else None)
    length = _whole(config["num_speculative_tokens"], text) if "num_speculative_tokens" in config else None
    options = [] if length is None else [f"k={length}"]
    if method in ("ngram", "[ngram]"):
        lookup = config.get("prompt_lookup_max", config.get("prompt_lookup_min", 5))
        shortest = config.get("prompt_lookup_min", lookup)
        options += [f"lookup_max={_whole(lookup, text)}", f"lookup_min={_whole(shortest, text)}"]
        return "ngram:" + ",".join(options)
    if method == "draft_model" and isinstance(config.get("model"), str):
        quote = "'" if '"' in config["model"] else '"'
        if quote in config["model"]:
            raise SpeculationSpecError("a model name cannot hold both kinds of quotes.", field="speculative-config")
        return "draft:" + ",".join([f"model={quote}{config['model']}{quote}", *options])
    raise SpeculationSpecError(
        f"method {method!r} has no counterpart here.",
        field="speculative-config",
        fix="Use method ngram, or draft_model with a model.",
    )


def _drafter(part: str) -> DrafterSpec:
    name, options = _named(part)
    k = _whole(options.pop("k"), part, 0) if "k" in options else None
    maximum = _whole(options.pop("max"), part, 0) if "max" in options else None
    if k is not None and maximum is not None:
        raise _error("k= and max= exclude each other", part)
    return DrafterSpec(name, k, maximum, options)


def _with_default_k(drafter: DrafterSpec, k: str | None, text: str) -> DrafterSpec:
    if drafter.k is not None:
        return drafter
    if k is None:
        raise _error(f"policy fixed needs k= for drafter {drafter.name}", text)
    if drafter.maximum is not None:
        raise _error("policy fixed has no max=; give k=", text)
    return DrafterSpec(drafter.name, _whole(k, text, 0), None, drafter.options)


def _named(part: str) -> tuple[str, dict[str, str]]:
    name, colon, rest = part.strip().partition(":")
    if not re.fullmatch(r"[\w-]+\+*", name):  # a policy's name may end in plus signs
        raise _error(f"{name!r} is not a name", part)
    options: dict[str, str] = {}
    for item in _split(rest, ",") if colon else ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise _error(f"{item!r} is not key=value", part)
        if key.strip() in options:
            raise _error(f"{key.strip()!r} is given twice", part)
        options[key.strip()] = _unquote(value.strip())
    return name, options


def _split(text: str, separator: str) -> list[str]:
    """Split outside quotes."""
    parts, quote = [""], ""
    for char in text:
        if char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote = char
        if char == separator and not quote:
            parts.append("")
        else:
            parts[-1] += char
    if quote:
        raise _error("a quote is not closed", text)
    return parts


def _unquote(value: str) -> str:
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'" else value


def _whole(value: object, text: str, least: int = 1) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if isinstance(value, bool) or not least <= number <= MAX_LENGTH:
        raise _error(f"{value!r} is not a whole number from {least} to {MAX_LENGTH}", text)
    return number


def _error(message: str, text: str) -> SpeculationSpecError:
    return SpeculationSpecError(f"cannot read {text!r}: {message}.", field="speculation", fix=_FIX)
