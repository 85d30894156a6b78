"""Schemas, regexes and grammars that loop, blow up, nest or are none: a 4xx that names the field, in bounded time.

Published for vLLM (CVE-2025-48942, -48943, -48944: invalid schemas and patterns ended the engine), xgrammar
(CVE-2025-32381: a cache without bound, CVE-2025-57809: recursion, CVE-2025-58446: nesting), outlines (CVE-2025-29770)
and llama.cpp (#4492, #5435, #25308, #26600: bad and deeply nested grammars ended the server).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from server_tools import Running, serving
from wire import CHAT, HELLO, PROMPT, TEXT, check_alive, check_error

from paceline.config import StructuredOutput
from paceline.errors import RequestError

SECONDS = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One second for a grammar, 16 kB of it."""
    with serving(grammar_timeout=SECONDS, max_grammar_bytes=16 << 10, engine={"speculation": "none"}) as running:
        running.service.grammars.start()
        yield running


@pytest.fixture(autouse=True)
def _the_engine_lives(server: Running) -> Iterator[None]:
    yield
    server.wait_idle()
    check_alive(server)


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _loop(*names: str) -> dict[str, Any]:
    """Definitions that refer to one another in a circle."""
    following = [*names[1:], names[0]]
    definitions = {
        a: {"type": "object", "properties": {"x": {"$ref": f"#/$defs/{b}"}}, "required": ["x"]}
        for a, b in zip(names, following, strict=True)
    }
    return {"$defs": definitions, "$ref": f"#/$defs/{names[0]}"}


SCHEMAS: dict[str, Any] = {
    "refers to itself": {"$ref": "#"},
    "refers to itself in a circle": _loop("a", "b", "c"),
    "all of itself": {"allOf": [{"$ref": "#"}]},
    "any of itself": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "no such definition": {"$ref": "#/$defs/nonesuch"},
    "another file": {"$ref": "file:///etc/passwd"},
    "an unknown type": {"type": "nonesuch"},
    "types that are no text": {"type": {"a": 1}},
    "properties that are none": {"type": "object", "properties": [1]},
    "a broken pattern": {"type": "string", "pattern": "("},
    "a pattern that repeats nothing": {"type": "string", "pattern": "(?<=x)*"},
    "a pattern that blows up": {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
    "a range upside down": {"type": "integer", "minimum": 5, "maximum": 1},
    "lengths upside down": {"type": "string", "minLength": 5, "maxLength": 1},
    "a huge length": {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    "nothing at all": {"enum": []},
    "deep": _nested(60),
}


HARMLESS = ("a pattern that blows up", "a huge length", "deep")


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(server: Running, name: str) -> None:
    """The same schema as a response format, as a structured output and as a tool's parameters."""
    schema = SCHEMAS[name]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for path, body, param in (
        (CHAT, {**HELLO, "response_format": form}, "response_format"),
        (TEXT, {**PROMPT, "structured_outputs": {"json": schema}}, "structured_outputs"),
        (CHAT, {**HELLO, "tools": [tool], "tool_choice": "required"}, "tool"),
    ):
        started = time.monotonic()
        response = server.post(path, body)
        assert time.monotonic() - started < SECONDS + 5
        if name in HARMLESS and response.status_code == 200:
            continue
        check_error(response, 400)
        # A tool's schema stands in the prompt too, and may be too long for it.
        assert response.json()["error"]["param"].startswith((param, "messages")), response.text


def test_the_engine_ignores_schemas_of_tools_that_need_not_be_called(server: Running) -> None:
    """With `tool_choice: auto` the schema is only shown to the model: broken ones do no harm (vLLM CVE-2025-48944)."""
    for schema in (*SCHEMAS.values(), {"type": ["x"], "pattern": 1}):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        assert server.post(CHAT, {**HELLO, "tools": [tool]}).status_code in (200, 400)


REGEXES = {
    "broken": "(",
    "a broken set": "[z-a]",
    "repeats nothing": "*",
    "counts down": "a{5,1}",
    "a huge count": "a{1000000000}",
    "blows up": "((a{1,300}){1,300}){1,300}",
    "nested": "(" * 3000 + "a" + ")" * 3000,
    "lookaround": "(?=a)(?!a)(?<=a)b",
    "backreference": r"(a)\1",
    "too long": "a" * (16 << 10) + "a",
    "not Unicode": "\\ud800",
}


@pytest.mark.parametrize("name", REGEXES)
def test_regexes(server: Running, name: str) -> None:
    """Refused within the time limit, or harmless."""
    started = time.monotonic()
    response = server.post(TEXT, {**PROMPT, "structured_outputs": {"regex": REGEXES[name]}})
    assert response.status_code == 400 or name in ("nested", "lookaround", "not Unicode")
    if response.status_code != 200:
        check_error(response, 400, "structured_outputs.regex")
    assert time.monotonic() - started < SECONDS + 5


@pytest.mark.parametrize("regex", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*)*x", "([a-z]+)*[0-9]"])
def test_regexes_that_backtrack(server: Running, regex: str) -> None:
    """Exponential for backtracking engines; here masks come from an automaton, and the answer in time."""
    started = time.monotonic()
    response = server.post(TEXT, {**PROMPT, "max_tokens": 64, "structured_outputs": {"regex": regex}})
    assert response.status_code in (200, 400)
    assert time.monotonic() - started < SECONDS + 5


GRAMMARS = {
    "empty": " ",
    "broken": 'root ::= "a',
    "no root": 'rout ::= "a"',
    "unknown rule": "root ::= nonesuch",
    "calls itself at once": 'root ::= root "a" | root',
    "never ends": 'root ::= "a" root',
    "never ends in a circle": 'root ::= a\na ::= "x" b\nb ::= "y" a',
    "nested": "root ::= " + "(" * 7000 + '"a"' + ")" * 7000,
    "another engine's": "%llguidance {}\nstart: /a/",
    "blows up": 'root ::= ((("a"{1,300}){1,300}){1,300}){1,300}',
    "many ways": 'root ::= a*\na ::= "x"* "x"* "x"* "x"* a?',
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars(server: Running, name: str) -> None:
    """Refused within the time limit, or harmless."""
    started = time.monotonic()
    response = server.post(TEXT, {**PROMPT, "structured_outputs": {"grammar": GRAMMARS[name]}})
    assert response.status_code == 400 or name in ("nested", "many ways")
    if response.status_code != 200:
        check_error(response, 400, "structured_outputs.grammar")
    assert time.monotonic() - started < SECONDS + 5


def test_the_limits_on_text(server: Running) -> None:
    """Every kind has one, and so has the number of choices."""
    most = 16 << 10
    for kind, value in (
        ("regex", "a" * (most + 1)),
        ("grammar", "#" * (most + 1)),
        ("json", {"description": "x" * most}),
        ("structural_tag", {"x": "x" * most}),
        ("choice", ["x" * most, "y"]),
        ("choice", ["x"] * 1025),
    ):
        response = server.post(TEXT, {**PROMPT, "structured_outputs": {kind: value}})
        check_error(response, 400)
        assert response.json()["error"]["param"].startswith("structured_outputs")


def test_compiling_holds_nobody_up(server: Running) -> None:
    """While hopeless grammars are compiled (and killed), other requests and probes are answered."""
    bodies = [{**PROMPT, "structured_outputs": {"regex": f"x{i}((a{{1,300}}){{1,300}}){{1,300}}"}} for i in range(2)]
    threads = [threading.Thread(target=server.post, args=(TEXT, body)) for body in bodies]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with server.client() as client:
        for _ in range(10):
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            assert client.post(TEXT, json=PROMPT).status_code == 200
            slowest = max(slowest, time.monotonic() - started)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert slowest < 1.5


def test_remembered_grammars_are_bounded(server: Running) -> None:
    """xgrammar CVE-2025-32381, outlines CVE-2025-29770: a cache that everybody fills for ever. Refusals count too."""
    grammars = server.service.grammars
    for i in range(300):
        grammars.constraint(StructuredOutput(regex=f"a{i}"))
    for i in range(20):
        with pytest.raises(RequestError):
            grammars.constraint(StructuredOutput(regex=f"({i}"))
    assert len(grammars._cache._items) <= 256
    assert grammars._cache._bytes == sum(size for _, size in grammars._cache._items.values()) <= 128 << 20
