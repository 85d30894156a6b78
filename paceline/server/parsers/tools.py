"""The `tools` of a request, as OpenAI writes them: `{"type": "function", "function": {"name", "parameters", ...}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def parameter_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Each function's name and the JSON schema of its parameters, empty where none is given.

    The request has been validated as far as every function has a name.
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        if function := tool.get("function"):
            schema = function.get("parameters")
            schemas[function["name"]] = schema if isinstance(schema, Mapping) else {}
    return schemas
