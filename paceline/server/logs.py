"""Structured logs: one line per event, as JSON for machines or short text for people.

What clients send can reach a log line (ids, paths, error texts), so control characters are escaped, values are cut,
credentials are masked, and fields that hold prompts, outputs or keys are dropped wherever they come from. Start uvicorn
with `log_config=None`, or it replaces what is set up here.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

from paceline.errors import ConfigError
from paceline.server.config import LOG_FORMATS, LOG_LEVELS

MAX_CHARS = 2000
"""Longest message or field value; a stack trace may have ten times as many."""

_HANDLER = "paceline"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_KEYS = ("api_key", "authorization", "cookie", "headers", "token")
_TEXTS = ("prompt", "messages", "input", "output", "text", "content", "body", "token_ids")
_NEVER = frozenset((*_KEYS, *_TEXTS))
"""Fields that are dropped even if somebody passes them by `extra=`."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SECRET = re.compile(r"(?i)(\bbearer\s+|\b(?:x-)?api[-_]?key[\"']?\s*[=:]\s*[\"']?|\bsk-)[^\s\"',;&]+")


def setup_logging(level: str, fmt: str) -> None:
    """Send all logs to standard error in one form. Calling it again replaces the earlier setup.

    Args:
        level: the least that Paceline and uvicorn log, `debug` to `error`; other libraries are heard from `warning` on.
        fmt: `json` (one object per line) or `text`.

    Raises:
        ConfigError: an unknown level or format.
    """
    if level not in LOG_LEVELS:
        raise ConfigError(f"is {level!r}.", field="log_level", fix=f"Take one of {', '.join(LOG_LEVELS)}.")
    if fmt not in LOG_FORMATS:
        raise ConfigError(f"is {fmt!r}.", field="log_format", fix=f"Take one of {', '.join(LOG_FORMATS)}.")
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr)
    handler.name = _HANDLER
    handler.setFormatter(JsonFormatter() if fmt == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        if old.name == _HANDLER or type(old) is logging.StreamHandler:  # ours, or basicConfig's
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(number, logging.WARNING))
    logging.getLogger("paceline").setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        # Our own lines say more of starting, stopping and each request, and clients could fill the log with uvicorn's
        # warnings of broken HTTP.
        logger.setLevel(max(number, logging.ERROR))
    logging.captureWarnings(True)


def log_request(
    logger: logging.Logger,
    *,
    request_id: str,
    route: str,
    status: int,
    prompt_tokens: int | None,
    output_tokens: int | None,
    seconds: float,
    finish_reason: str | None,
    **more: str | int | float | bool | None,
) -> None:
    """Log the end of one request: `info`, or `error` for a fault of the server (status 500).

    Args:
        logger: where to.
        request_id: the id that the client also sees.
        route: the route's template.
        status: HTTP status code.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens generated, over all samples.
        seconds: from the request's arrival to the last byte of the response.
        finish_reason: why it ended; None if it never ran.
        more: further short facts (`tenant`, `cached_tokens`, `ttft_seconds`); None is left out.
    """
    fields: dict[str, str | int | float | bool | None] = {
        "request_id": request_id,
        "route": route,
        "status": status,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "seconds": round(seconds, 4),
        "finish_reason": finish_reason,
        **more,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    logger.log(logging.ERROR if status == 500 else logging.INFO, "request", extra=given)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, the fields of `extra=`, and a stack trace."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _clean(record.getMessage()),
        }
        for name, value in _fields(record).items():
            entry.setdefault(name, value)
        trace = _trace(record)
        if trace:
            entry["trace"] = trace
        return json.dumps(entry)  # ASCII, so that every control character is escaped


class TextFormatter(logging.Formatter):
    """`time level logger: message key=value ...`; a stack trace follows, each of its lines behind a bar."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower():7} {record.name}: {_escape(_clean(record.getMessage()))}"
        for name, value in _fields(record).items():
            line += f" {_escape(name)}={_quoted(value)}"
        # The bar keeps a forged line inside an exception's text from looking like one of ours.
        return line + "".join(f"\n  | {_escape(part)}" for part in _trace(record).splitlines())


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was passed by `extra=`, without what must not be logged; numbers stay numbers."""
    found: dict[str, Any] = {}
    for name, value in vars(record).items():
        if name in _STANDARD or name.lower() in _NEVER:
            continue
        plain = value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        found[name] = value if plain else _clean(str(value))
    return found


def _clean(text: str, limit: int = MAX_CHARS) -> str:
    """Cut and mask, the cut first: masking costs time on what a client made long."""
    cut = text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
    return _SECRET.sub(r"\1***", cut)


def _escape(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _quoted(value: Any) -> str:
    """Text with blanks, quotes or `=` in quotes, so that a value cannot pass for another field."""
    text = _escape(str(value))
    return json.dumps(text, ensure_ascii=False) if not text or re.search(r'[\s"=]', text) else text


def _trace(record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info and record.exc_info[1] is not None:
        parts.append("".join(traceback.format_exception(record.exc_info[1])))
    if record.stack_info:
        parts.append(record.stack_info)
    return _clean("\n".join(parts), 10 * MAX_CHARS)
