"""Logs: one line per event whatever clients send, and nothing in them that must stay private."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.errors import ConfigError
from paceline.server import logs
from paceline.server.logs import MAX_CHARS, log_request, setup_logging

LOGGERS = ("", "paceline", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
FORGED = "x\n2026-01-01T00:00:00.000Z error   paceline: forged\r\x1b[31m\u2028\x00"


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Standard error; the loggers are as before when the test ends."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    stream = io.StringIO()
    monkeypatch.setattr(logs, "sys", SimpleNamespace(stderr=stream))
    yield stream
    logging.captureWarnings(False)
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


def end_request(logger: logging.Logger, status: int = 200, **more: Any) -> None:
    values: dict[str, Any] = {"request_id": "req-1", "finish_reason": "stop", **more}
    log_request(
        logger,
        route="/v1/completions",
        status=status,
        prompt_tokens=5,
        output_tokens=9,
        seconds=1.23456,
        **values,
    )


def one_object(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert isinstance(entry, dict)
    return entry


def test_json_line(stderr: io.StringIO) -> None:
    setup_logging("info", "json")
    end_request(logging.getLogger("paceline.server"), tenant="acme", ttft_seconds=None)
    entry = one_object(stderr)
    assert datetime.fromisoformat(entry.pop("time")).utcoffset() == timedelta(0)
    assert entry == {
        "level": "info",
        "logger": "paceline.server",
        "message": "request",
        "request_id": "req-1",
        "route": "/v1/completions",
        "status": 200,
        "prompt_tokens": 5,
        "output_tokens": 9,
        "seconds": 1.2346,
        "finish_reason": "stop",
        "tenant": "acme",
    }


def test_text_line(stderr: io.StringIO) -> None:
    setup_logging("info", "text")
    end_request(logging.getLogger("paceline.server"), tenant="a b=c", status=500)
    line = stderr.getvalue()
    assert line.count("\n") == 1
    assert " error   paceline.server: request request_id=req-1 route=/v1/completions status=500 " in line
    assert 'tenant="a b=c"' in line


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_what_clients_send_cannot_forge_a_line(stderr: io.StringIO, fmt: str) -> None:
    setup_logging("info", fmt)
    logger = logging.getLogger("paceline.server")
    logger.warning("no such model: %s", FORGED)
    end_request(logger, request_id=FORGED)
    text = stderr.getvalue()
    assert len(text.splitlines()) == 2  # splitlines also breaks at U+2028
    assert not set(text) & {"\r", "\x1b", "\x00", "\u2028"}


def test_a_forged_line_in_a_stack_trace(stderr: io.StringIO) -> None:
    setup_logging("info", "text")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("paceline").exception("failed")
    first, *rest = stderr.getvalue().splitlines()
    assert first.endswith("paceline: failed")
    assert rest
    assert all(line.startswith("  | ") for line in rest)


def test_stack_trace_in_json(stderr: io.StringIO) -> None:
    setup_logging("info", "json")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("paceline").exception("failed")
    assert one_object(stderr)["trace"].endswith("ValueError: boom\n")


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_private_things_stay_private(stderr: io.StringIO, fmt: str) -> None:
    setup_logging("info", fmt)
    logger = logging.getLogger("paceline.server")
    logger.info(
        "got Authorization: Bearer hunter2-key and api_key=hunter2-key, sk-hunter2", extra={"prompt": "hunter2"}
    )
    logger.info("x", extra={"authorization": "hunter2", "API_KEY": "hunter2", "note": "x-api-key: hunter2"})
    end_request(logger, output="hunter2")
    assert "hunter2" not in stderr.getvalue()
    assert stderr.getvalue().count("***") == 4


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_long_values_are_cut(stderr: io.StringIO, fmt: str) -> None:
    setup_logging("info", fmt)
    end_request(logging.getLogger("paceline"), request_id="x" * 1_000_000)
    assert len(stderr.getvalue()) < 2 * MAX_CHARS


def test_values_that_json_lacks(stderr: io.StringIO) -> None:
    setup_logging("info", "json")
    logging.getLogger("paceline").info("x", extra={"rate": float("nan"), "names": ["a"], "good": True})
    entry = one_object(stderr)
    assert (entry["rate"], entry["names"], entry["good"]) == ("nan", "['a']", True)


def test_levels_and_uvicorn(stderr: io.StringIO) -> None:
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler(io.StringIO()))
    setup_logging("info", "json")
    setup_logging("info", "json")  # a second time: still one line per event
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("uvicorn.error").error("odd", extra={"color_message": "\x1b[1modd"})
    logging.getLogger("uvicorn.access").info("GET /?api_key=secret")
    logging.getLogger("paceline").debug("too fine")
    logging.getLogger("httpx").info("foreign")
    assert one_object(stderr) | {"time": ""} == {
        "time": "",
        "level": "error",
        "logger": "uvicorn.error",
        "message": "odd",
    }


@pytest.mark.parametrize(("level", "fmt"), [("loud", "json"), ("info", "xml")])
def test_unknown_settings_are_refused(level: str, fmt: str) -> None:
    with pytest.raises(ConfigError):
        setup_logging(level, fmt)
