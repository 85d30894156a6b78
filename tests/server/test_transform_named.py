"""A declared target transform is named in every answer that was sampled under it, and in no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_tools import Running, events, serving

SPEC = "rapid:model=self,k=2,start=4,chunk=8,budget=16,question=8"
CHAT = {"messages": [{"role": "user", "content": "the red hat and the blue hat " * 4}], "max_tokens": 6, "seed": 1}
TEXT = {"prompt": "the red hat and the blue hat " * 4, "max_tokens": 6, "seed": 1}


@pytest.fixture(scope="module")
def transforming() -> Iterator[Running]:
    with serving(engine={"speculation": f"{SPEC},transfer=10"}) as running:
        yield running


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_it_is_named_whole_and_streamed(transforming: Running, path: str, body: dict[str, object]) -> None:
    whole = transforming.post(path, body)
    assert whole.status_code == 200
    assert whole.json()["target_transform"] == "rapid:transfer=10"
    chunks = events(transforming.post(path, {**body, "stream": True}))
    assert chunks[0]["target_transform"] == "rapid:transfer=10"
    assert all("target_transform" not in chunk for chunk in chunks[1:])


def test_without_one_there_is_no_such_field() -> None:
    with serving(engine={"speculation": SPEC}) as plain:
        assert "target_transform" not in plain.post("/v1/chat/completions", CHAT).json()
        chunks = events(plain.post("/v1/chat/completions", {**CHAT, "stream": True}))
        assert all("target_transform" not in chunk for chunk in chunks)
