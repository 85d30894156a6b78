"""Errors at the HTTP edge, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

What the caller sent is never echoed: messages name the field and the rule it broke.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_json
from starlette.responses import Response

from paceline.errors import BusyError, EngineDeadError, PacelineError, PromptTooLongError, RequestError
from paceline.server.refusals import REASONS

RETRY_AFTER_SECONDS = 1
_MOST_PROBLEMS = 1000

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class HTTPError(PacelineError):
    """An answer other than 2xx.

    Args:
        status: the HTTP status.
        code: OpenAI's machine-readable code.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, fix: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, field=field, fix=fix)
        self.status = status
        self.code = code


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error; unknown ones become a 500 that says nothing of the inside."""
    if isinstance(error, HTTPError):
        status, code = error.status, error.code
    elif isinstance(error, PromptTooLongError):
        status, code = 400, "context_length_exceeded"
    elif isinstance(error, RequestError):
        status, code = 400, "invalid_value"
    elif isinstance(error, EngineDeadError):
        status, code = 503, "engine_dead"
    elif isinstance(error, BusyError):
        status, code = 503, "busy"
    else:
        return 500, _shape(500, "the server failed to answer; its log says why.", None, "internal_error")
    assert isinstance(error, PacelineError)
    return status, _shape(status, _text(error), error.field, code)


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    """The whole response of an error."""
    status, body = error_body(error)
    more = dict(headers or {})
    if status == 503:
        more["retry-after"] = str(RETRY_AFTER_SECONDS)
    if status == 401:
        more["www-authenticate"] = "Bearer"
    return Response(to_json(body), status_code=status, headers=more, media_type="application/json")


def invalid_body(error: ValidationError, body: bytes) -> HTTPError:
    """A body that is not JSON or does not fit the schema. Of several problems (a union's members each have one) that of
    the member that fits best is named: not the wrong type altogether, and wrong as deep inside as may be."""
    if error.error_count() > _MOST_PROBLEMS:  # listing them would hold up everyone else
        return HTTPError(400, f"the body has {error.error_count()} faults.", code="invalid_value")
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        return HTTPError(400, "the body is not valid JSON.", code="invalid_json")
    content = from_json(body)
    places = [_place(problem["loc"], content, problem["type"] == "missing") for problem in problems]
    best = max(range(len(problems)), key=lambda i: _fit(problems[i]["type"], places[i]))
    problem = problems[best]
    field = ".".join(str(part) for part in places[best]) or None
    message = f"{problem['msg'].removeprefix('Value error, ')}."
    if problem["type"] == "missing":
        message = "is missing."
    elif problem["type"] in ("extra_forbidden", "literal_error"):
        message = REASONS.get(field or "", "is not known here." if problem["type"] == "extra_forbidden" else message)
    return HTTPError(400, _printable(message), field=_printable(field) if field else None, code="invalid_value")


def _fit(kind: str, place: Sequence[int | str]) -> tuple[bool, int, int]:
    """How well the member of a union fits that has this problem."""
    last = place[-1] if place else 0
    return not kind.endswith("_type"), len(place), last if isinstance(last, int) else 0


def _place(location: Sequence[int | str], content: Any, missing: bool) -> list[int | str]:
    """The part of a location that the caller wrote; pydantic mixes in the names of a union's members."""
    place: list[int | str] = []
    for i, part in enumerate(location):
        inside = part in content if isinstance(content, dict) else _is_index(part, content)
        if inside:
            content = content[part]
        if inside or (missing and i == len(location) - 1):
            place.append(part)
    return place


def _is_index(part: int | str, content: Any) -> bool:
    return isinstance(content, list) and isinstance(part, int) and part < len(content)


def _shape(status: int, message: str, field: str | None, code: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def _text(error: PacelineError) -> str:
    parts = [f"{error.field}:" if error.field else "", error.message, error.fix or ""]
    return _printable(" ".join(part for part in parts if part))


def _printable(text: str) -> str:
    """Valid UTF-8 of bounded length: names of unknown fields come from the caller."""
    return text.encode("utf-8", "replace").decode()[:2000]
