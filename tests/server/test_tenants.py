"""Tenants never share cached state: neither KV blocks nor what drafters learned from somebody's text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_tools import Running, serving
from wire import CHAT, HELLO, TEXT, check_error

HEADER = "x-tenant"
PROMPT = "the same long beginning of every prompt " * 4
Identity = tuple[str, str | None]
"""Tenant and cache salt."""


@pytest.fixture(scope="module")
def tenants() -> Iterator[Running]:
    """A server that is told the tenant by a header."""
    with serving(tenant_header=HEADER, engine={"speculation": "none"}) as running:
        yield running


def ask(server: Running, who: Identity, prompt: str = PROMPT, **options: Any) -> dict[str, Any]:
    """One completion for somebody."""
    tenant, salt = who
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **options}
    response = server.post(TEXT, {**body, "cache_salt": salt} if salt else body, headers={HEADER: tenant})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def cached(answer: dict[str, Any]) -> int:
    """Prompt tokens that were not computed."""
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_the_header_is_required(tenants: Running) -> None:
    """A request without it would share state with everybody who has none."""
    for path, body in ((CHAT, HELLO), (TEXT, {"prompt": "a"})):
        for headers in ({}, {HEADER: ""}):
            check_error(tenants.post(path, body, headers=headers), 400, HEADER, "tenant_missing")
            check_error(tenants.post(path, {**body, "stream": True}, headers=headers), 400, HEADER, "tenant_missing")


ALL: list[Identity] = [
    ("a", None),
    ("b", None),
    ("a", "s"),
    ("b", "s"),
    ("as", None),
    ("1:a", None),
    ("a", "1:a"),
    ("A", None),
    ("a,b", None),
    ("é", None),
    ("x" * 300, None),
]


def test_hits_stay_within_tenant_and_salt(tenants: Running) -> None:
    """Nobody's first request hits, everybody's second one does; names that run into their salts are no exception."""
    client_answers = [ask_raw(tenants, who) for who in ALL]
    assert [cached(answer) for answer in client_answers] == [0] * len(ALL)
    for who in ALL:
        assert cached(ask_raw(tenants, who)) > 100, who
    assert len({answer["choices"][0]["text"] for answer in client_answers}) == 1


def ask_raw(server: Running, who: Identity) -> dict[str, Any]:
    """As `ask`, with header values that are not ASCII."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    content = json.dumps({**body, "cache_salt": who[1]} if who[1] else body)
    headers = [(HEADER.encode(), who[0].encode()), (b"content-type", b"application/json")]
    with server.client() as client:
        response = client.post(TEXT, content=content, headers=httpx.Headers(headers))
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_second_header_changes_nothing(tenants: Running) -> None:
    """A proxy's header comes first; one that the client appends is not looked at."""
    body = {"prompt": "x" * 100, "max_tokens": 1}
    headers = [(HEADER, "first"), (HEADER, "second"), ("content-type", "application/json")]
    with tenants.client() as client:
        assert cached(client.post(TEXT, content=json.dumps(body), headers=headers).json()) == 0
        assert cached(client.post(TEXT, json=body, headers={HEADER: "second"}).json()) == 0
        assert cached(client.post(TEXT, json=body, headers={HEADER: "first"}).json()) > 0


def test_salts_alone_separate_too(server: Running) -> None:
    """Without a tenant header anyone may keep to himself by a salt (vLLM's CVE-2025-46570: timing of the cache)."""
    body = {"prompt": "z" * 100, "max_tokens": 1}
    for salt in (None, "s", "t", "0:s"):
        own = {**body, "cache_salt": salt} if salt else body
        assert cached(server.post(TEXT, own).json()) == 0
        assert cached(server.post(TEXT, own).json()) > 0


def drafted(answer: dict[str, Any]) -> int:
    """Draft tokens that were verified."""
    return int(answer["metrics"]["speculative_decoding"]["num_draft_tokens"])


def test_drafts_learned_from_one_tenant_do_not_reach_another() -> None:
    """`recycling` proposes what the model thought likely after a token before: only where the same tenant saw it.

    A tenant whose first request is the same as another one's gets as few drafts as that one got, and more when it
    comes back. The length is fixed, since a planned one depends on measured times.
    """
    with serving(tenant_header=HEADER, engine={"speculation": "recycling:k=8"}) as running:
        counts: dict[str, list[int]] = {}
        texts = set()
        for name in ("a", "a", "b", "b", "c"):
            answer = ask(running, (name, None), "q" * 40, max_tokens=24, speculation={"metrics": True})
            counts.setdefault(name, []).append(drafted(answer))
            texts.add(answer["choices"][0]["text"])
        salted = ask(running, ("a", "s"), "q" * 40, max_tokens=24, speculation={"metrics": True})
    assert len(texts) == 1, "speculation never changes the text"
    assert counts["a"][1] != counts["a"][0], "what was learned is used"
    assert counts["b"] == counts["a"], "another tenant begins as the first one did"
    assert counts["c"][0] == counts["a"][0] == drafted(salted)
