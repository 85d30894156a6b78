"""The `tools` of a request, as OpenAI writes them: `{"type": "function", "function": {"name", "parameters", ...}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def parameter_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Each function's name and the JSON schema of its parameters; where none is given, there are none.

    The request has been validated as far as every function has a name.
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        if function := tool.get("function"):
            schema = function.get("parameters")
            schemas[function["name"]] = schema if isinstance(schema, Mapping) and schema else NO_PARAMETERS
    return schemas
