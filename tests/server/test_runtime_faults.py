"""What goes wrong while a request runs: the request's own fault is a 400, ours a 500, and nobody else notices."""

from __future__ import annotations

from typing import Any

import pytest
from server_tools import Running, events

from paceline.constrain.matcher import GrammarConstraint
from paceline.errors import PacelineError, RequestError

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a"}],
    "structured_outputs": {"regex": "[ab]{40}"},
    "max_tokens": 50,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "field"),
    [
        (RequestError("took too long.", field="structured_outputs.regex"), 400, "structured_outputs.regex"),
        (PacelineError("the model is broken."), 500, None),
    ],
)
def test_a_fault_in_the_middle(
    server: Running, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, field: str | None, stream: bool
) -> None:
    advance = GrammarConstraint.advance
    calls = 0

    def failing(constraint: GrammarConstraint, token: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error
        advance(constraint, token)

    monkeypatch.setattr(GrammarConstraint, "advance", failing)
    answer = server.post(CHAT, {**BODY, "stream": stream})
    if stream:
        found = events(answer)[-1]["error"]
    else:
        assert answer.status_code == status
        found = answer.json()["error"]
    assert found["param"] == field
    assert found["type"] == ("server_error" if status == 500 else "invalid_request_error")
    monkeypatch.undo()
    assert server.post(CHAT, BODY).status_code == 200
    server.wait_idle()
