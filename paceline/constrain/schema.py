"""JSON schemas before they are compiled: refuse what xgrammar would drop silently, so that a text that fits the grammar
fits the schema. Runs in the compiler's process, since a schema may be anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 64
_NOT_ENFORCED = (
    *("not", "if", "then", "else", "multipleOf", "contains", "minContains", "maxContains"),
    *("dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef", "contentSchema"),
)
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
"""Keywords beside which xgrammar reads no other."""
_ASSERTIONS = {
    *("type", "enum", "const", *_ALONE, "format", "pattern", "minLength", "maxLength"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties"),
    *("maxProperties", "unevaluatedProperties", "items", "prefixItems", "additionalItems", "unevaluatedItems"),
    *("minItems", "maxItems"),
}
_ESCAPED = re.compile(r'["\x00-\x1f]|\\\\|\\[ntrfv0c]|\\x[01]|\\x22|\\x5[cC]|\\u00[01]|\\u0022|\\u005[cC]')
"""Parts of a pattern that spell a character which JSON writes with a backslash; xgrammar would not."""
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}


@dataclass(slots=True)
class Problem(Exception):
    """Why a source was refused: one sentence, and the way out."""

    message: str
    fix: str | None = None


def check_schema(text: str) -> None:
    """Check a JSON schema.

    Raises:
        Problem: it is no JSON, no schema, or asks for something that cannot be enforced.
    """
    _check(parse_json(text), "", 0)


def check_structural_tag(text: str) -> None:
    """Check the schemas inside a structural tag.

    Raises:
        Problem: it is no JSON object, or one of its schemas is refused.
    """
    tag = parse_json(text)
    if not isinstance(tag, dict):
        raise Problem("must be a JSON object.")
    for schema in _schemas(tag, 0):
        _check(schema, "", 0)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        Problem: it has none.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise Problem(f"is not JSON: {error}.") from error
    except RecursionError as error:
        raise Problem("is nested too deeply.", f"Use at most {MAX_DEPTH} levels.") from error


def _schemas(value: Any, depth: int) -> Iterator[Any]:
    if depth > 4 * MAX_DEPTH:
        raise Problem("is nested too deeply.")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if key in ("json_schema", "schema"):
            yield inner
        else:
            yield from _schemas(inner, depth + 1)


def _check(schema: Any, path: str, depth: int) -> None:
    here = f"at {path}: " if path else ""
    if depth > MAX_DEPTH:
        raise Problem("is nested too deeply.", f"Use at most {MAX_DEPTH} levels.")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise Problem(f"{here}a schema must be an object, not {json.dumps(schema)[:40]}.")
    for key in _NOT_ENFORCED:
        if key in schema:
            raise Problem(f"{here}the keyword {key!r} cannot be enforced.", "Leave it out, and check it afterwards.")
    if schema.get("uniqueItems"):
        raise Problem(f"{here}the keyword 'uniqueItems' cannot be enforced.", "Leave it out, and check it afterwards.")
    _check_alone(schema, here)
    _check_object(schema, here)
    _check_patterns(schema, here)
    for name, inner in _inner(schema):
        _check(inner, f"{path}/{name}", depth + 1)


def _check_alone(schema: Mapping[str, Any], here: str) -> None:
    """Some keywords make xgrammar ignore those beside them."""
    used = set(schema) & _ASSERTIONS
    for key in _ALONE:
        beside = sorted(used - {key})
        if key in schema and beside:
            raise Problem(f"{here}{beside[0]!r} beside {key!r} cannot be enforced.", f"Move it into {key}.")
    lengths = sorted(used & {"minLength", "maxLength"})
    if lengths and used & {"pattern", "format"}:
        raise Problem(
            f"{here}{lengths[0]!r} beside 'pattern' or 'format' cannot be enforced.", "Put it into a pattern."
        )
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        raise Problem(f"{here}'allOf' of several schemas cannot be enforced.", "Write them as one schema.")
    if str(schema.get("$ref", "#"))[:1] != "#":
        raise Problem(f"{here}'$ref' to another document cannot be followed.", "Copy it under $defs.")
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        beside = sorted(used - {"enum", "const", "type"})
        if beside:
            raise Problem(f"{here}{beside[0]!r} beside 'enum' or 'const' cannot be enforced.", "Shorten the enum.")
        for value in values if isinstance(values, list) else ():
            if "type" in schema and not _is_of(value, schema["type"]):
                raise Problem(f"{here}the value {json.dumps(value)[:40]} is not of the type beside it.")


def _is_of(value: Any, kind: Any) -> bool:
    kinds = kind if isinstance(kind, list) else [kind]
    fits = tuple(t for k in kinds if isinstance(k, str) for t in _TYPES.get(k, (object,)))
    if isinstance(value, bool):
        return bool in fits or object in fits
    return isinstance(value, fits)


def _check_object(schema: Mapping[str, Any], here: str) -> None:
    """A required property that is not described would be dropped."""
    required, known = schema.get("required"), schema.get("properties", {})
    if isinstance(required, list) and isinstance(known, dict):
        missing = [name for name in required if name not in known]
        if missing:
            raise Problem(
                f"{here}the required property {missing[0]!r} is not described.", "Describe it under properties."
            )


def _check_patterns(schema: Mapping[str, Any], here: str) -> None:
    patterns = [schema.get("pattern"), *_mapping(schema.get("patternProperties"))]
    for pattern in patterns:
        if isinstance(pattern, str) and _ESCAPED.search(pattern):
            raise Problem(
                f"{here}the pattern {pattern[:60]!r} needs a quote, a backslash or a control character.",
                "Patterns are matched against the JSON text, where those are escaped; leave them out.",
            )


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside a schema, with the way to them."""
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        for name, inner in _mapping(schema.get(key)).items():
            yield f"{key}/{name}", inner
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(schema.get(key), list):
            yield from ((f"{key}/{i}", inner) for i, inner in enumerate(schema[key]))
    for key in ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties"):
        if key in schema:
            yield key, schema[key]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
