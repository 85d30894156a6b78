"""One test for each class of weakness published for servers of this kind; each names where it was found.

Classes that have a file of their own: unguarded routes, header injection, endless heads, slow clients and smuggling in
`test_gate`; queue exhaustion in `test_queue`; cache timing (vLLM CVE-2025-46570) in `test_tenants`; tool parsers
(vLLM CVE-2025-48887, CVE-2025-9141) in `test_parser_robustness`; schemas, regexes and grammars in
`test_weak_grammars`; JSON in `test_weak_json`; GGUF (llama.cpp, Ollama) in `tests/unit/test_gguf_overflow`; code in
checkpoints (vLLM CVE-2025-66448) in `test_loader`.
"""

from __future__ import annotations

import ast
import hmac
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_tools import MAX_LEN, Running, make_byte_loaded, serving
from wire import (
    CHAT,
    HELLO,
    PROMPT,
    TEXT,
    check_alive,
    check_error,
    exchange,
    request_bytes,
)

import paceline
from paceline.cache.block_manager import _block_hash, _root_hash
from paceline.server.logs import TextFormatter

SOURCES = sorted(Path(paceline.__file__).parent.rglob("*.py"))
HUGE = (2**31, 2**63, 2**64, 10**18, 10**30, -1, -(2**31), -(2**63))


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(autouse=True)
def _the_engine_lives(server: Running) -> Iterator[None]:
    yield
    server.wait_idle()
    check_alive(server)


@pytest.mark.parametrize("value", HUGE)
def test_unbounded_n_and_best_of(client: httpx.Client, value: int) -> None:
    """vLLM CVE-2026-34756 and CVE-2024-8939: a huge `n` or `best_of` filled memory before anything was checked."""
    started = time.monotonic()
    check_error(client.post(CHAT, json={**HELLO, "n": value}), 400, "n")
    check_error(client.post(TEXT, json={**PROMPT, "n": value}), 400, "n")
    check_error(client.post(TEXT, json={**PROMPT, "best_of": value}), 400, "best_of")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("value", [*HUGE, 21, MAX_LEN, True, "all"])
def test_unbounded_logprobs(client: httpx.Client, value: object) -> None:
    """vLLM: `prompt_logprobs=-1` meant the whole vocabulary for every prompt token, and ended the engine."""
    check_error(client.post(TEXT, json={**PROMPT, "logprobs": value, "echo": True}), 400, "logprobs")
    check_error(client.post(CHAT, json={**HELLO, "logprobs": True, "top_logprobs": value}), 400, "top_logprobs")
    for path, body in ((CHAT, HELLO), (TEXT, PROMPT)):
        check_error(client.post(path, json={**body, "prompt_logprobs": value}), 400, "prompt_logprobs")


def test_echo_of_a_prompt_alone(client: httpx.Client) -> None:
    """vLLM #6521 and #5890: `echo` with `max_tokens: 0` and `logprobs` ended the engine."""
    body = {"prompt": "the prompt", "max_tokens": 0, "echo": True, "logprobs": 20}
    choice = client.post(TEXT, json=body).json()["choices"][0]
    assert choice["text"] == "the prompt"
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])


@pytest.mark.parametrize(
    "field", ["max_tokens", "min_tokens", "top_k", "seed", "stop_token_ids", "n_discard", "n_keep"]
)
def test_integers_of_any_size_and_sign(client: httpx.Client, field: str) -> None:
    """llama.cpp CVE-2026-21869: a negative count became an offset; Triton CVE-2026-24173: one that wraps."""
    for value in (*HUGE, 1.5, -1.0, 1e300):
        sent = [value] if field == "stop_token_ids" else value
        response = client.post(TEXT, json={**PROMPT, field: sent})
        assert response.status_code in (200, 400), (value, response.text)
        if response.status_code == 400:
            assert response.json()["error"]["param"].split(".")[0] == field


@pytest.mark.parametrize("prompt", [[512], [511], [MAX_LEN * 1000], [-1], [2**31 - 1], [2**40], [0, 1.5], [[1], [-1]]])
def test_token_ids_outside_the_vocabulary(client: httpx.Client, prompt: list[Any]) -> None:
    """vLLM: token ids in prompts indexed the embedding unchecked; also ids that the model has and the tokenizer not."""
    check_error(client.post(TEXT, json={**PROMPT, "prompt": prompt}), 400)


def test_empty_prompts(client: httpx.Client) -> None:
    """vLLM CVE-2024-8768: a completion of nothing ended the server."""
    for prompt in ("", [], [""], [[]], ["a", ""]):
        check_error(client.post(TEXT, json={**PROMPT, "prompt": prompt}), 400)
    assert client.post(CHAT, json={**HELLO, "messages": [{"role": "user", "content": ""}]}).status_code == 200


def test_floods_of_stop_texts_and_biases(client: httpx.Client) -> None:
    """vLLM #51447: as many stop texts, stop tokens and biases as fit in a body, each looked at after every token."""
    for field, value in (
        ("stop", [f"{i}" for i in range(100_000)]),
        ("stop", "x" * 1_000_000),
        ("stop_token_ids", list(range(100_000))),
        ("logit_bias", {str(i): 1 for i in range(100_000)}),
    ):
        check_error(client.post(TEXT, json={**PROMPT, field: value}), 400, field)
    most = {"stop": [chr(97 + i) * 512 for i in range(16)], "stop_token_ids": list(range(64))}
    assert client.post(TEXT, json={**PROMPT, **most, "logit_bias": {"1": -100}}).status_code == 200


TEMPLATE_TRICKS = [
    {"chat_template": "{{ 1 }}"},
    {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {"chat_template_kwargs": {"tokenize": True}},
    {"chat_template_kwargs": {"messages": "x"}},
    {"chat_template_kwargs": {"tools": "x"}},
    {"chat_template_kwargs": {"conversation": "x"}},
    {"chat_template_kwargs": {"documents": "x"}},
    {"chat_template_kwargs": {"return_dict": True}},
    {"chat_template_kwargs": {"a b": 1}},
    {"chat_template_kwargs": {"x": {"nested": 1}}},
]


@pytest.mark.parametrize("change", TEMPLATE_TRICKS, ids=json.dumps)
def test_templates_in_requests(client: httpx.Client, change: dict[str, Any]) -> None:
    """vLLM CVE-2025-61620 (a template of one's own) and CVE-2025-62426 (arguments of the renderer in its kwargs)."""
    response = client.post(CHAT, json={**HELLO, **change})
    check_error(response, 400)
    assert response.json()["error"]["param"].split(".")[0] in change


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'x' * n }}",
        "{{ raise_exception(messages[0]['content']) }}",
        "{{ undefined.attribute }}",
        "{% if %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_templates_of_models(template: str) -> None:
    """SGLang CVE-2026-5760: a model's template ran code; and templates that loop. They run in a sandbox, and fail as
    400 without saying what they saw; a conversation never is a template itself."""
    with serving(make_byte_loaded(template=template), engine={"speculation": "none"}) as running:
        body = {"messages": [{"role": "user", "content": "secret {{ 7 * 7 }}"}], "chat_template_kwargs": {"n": "x"}}
        message = check_error(running.post(CHAT, {**HELLO, **body}), 400, "messages")
        assert "secret" not in message
        assert "class" not in message
        check_alive(running)


def test_conversations_are_no_templates(server: Running) -> None:
    """What users write is text: braces and statements stay as they are."""
    text = "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}"
    body = {"messages": [{"role": "user", "content": text}]}
    tokens = server.post("/tokenize", body).json()["tokens"]
    assert text in server.post("/detokenize", {"tokens": tokens}).json()["prompt"]


def test_no_embeddings_no_pickles(client: httpx.Client) -> None:
    """vLLM CVE-2025-62164 and CVE-2025-32444: tensors and pickles in requests. No such field, and nothing unpickles."""
    for path, body in ((CHAT, HELLO), (TEXT, PROMPT)):
        for field in ("prompt_embeds", "multi_modal_data", "mm_processor_kwargs", "kv_transfer_params", "lora_path"):
            check_error(client.post(path, json={**body, field: "gASVAAAA"}), 400, field)


def _calls_and_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]
            yield f"{node.module}.{node.names[0].name}"
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func) + "()"


def test_nothing_unpickles_evaluates_or_fetches() -> None:
    """vLLM CVE-2025-9141 (`eval` of arguments) and CVE-2025-6242 (URLs fetched): no code here could do that at all."""
    banned = {"pickle", "dill", "marshal", "shelve", "cloudpickle", "requests", "aiohttp", "httpx", "ftplib", "urllib3"}
    banned |= {"eval()", "exec()", "compile()", "torch.load()", "os.system()", "yaml.load()"}
    in_server = {"urllib", "urllib.request.urlopen", "http", "subprocess"}
    assert len(SOURCES) > 100
    for path in SOURCES:
        found = set(_calls_and_imports(ast.parse(path.read_text())))
        if path.parent.name == "bench":  # the load bench is a client
            found.discard("httpx")
        assert not found & banned, (path.name, found & banned)
        if path.parent.name in ("server", "protocol", "parsers") and path.name != "connection.py":
            assert not found & in_server, (path.name, found & in_server)


def test_urls_are_not_fetched(server: Running) -> None:
    """vLLM CVE-2025-6242 and TGI: images by URL made the server ask other hosts. Refused, and nobody is called."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        for part in (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "file", "file": {"file_id": url}},
            {"type": "text", "text": "x", "image_url": {"url": url}},
        ):
            check_error(server.post(CHAT, {"messages": [{"role": "user", "content": [part]}]}), 400)
        schema = {"type": "object", "properties": {"a": {"$ref": url}}}
        response = server.post(TEXT, {**PROMPT, "structured_outputs": {"json": schema}})
        assert response.status_code == 400
        with pytest.raises(TimeoutError):
            listener.accept()


def test_prefix_hashes_do_not_collide() -> None:
    """vLLM CVE-2025-25183: Python's own hash let foreign prompts meet on purpose. Here: BLAKE2, keyed by salt."""
    assert hash(-1) == hash(-2)
    seen = {_block_hash(_root_hash(salt), tokens) for salt in ("", "a") for tokens in ([-1], [-2], [1, 2], [12], [258])}
    assert len(seen) == 10
    assert {len(value) for value in seen} == {16}


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM CVE-2025-59425: comparing keys with `==` told how many characters fit. All keys, always, as a whole."""
    seen: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest

    def spy(given: Any, key: Any) -> bool:
        seen.append((given, key))
        return original(given, key)

    with serving(api_key=("first", "second"), engine={"speculation": "none"}) as running:
        monkeypatch.setattr("paceline.server.middleware.hmac.compare_digest", spy)
        with running.client() as client:
            for key in ("first", "second", "f", ""):
                client.get("/v1/models", headers={"authorization": f"Bearer {key}".strip()})
    assert len(seen) == 8


def test_paths_stay_names(server: Running) -> None:
    """Ollama CVE-2024-37032 and Triton CVE-2026-24208: a name from a request became a path. Models are only names."""
    for name in (
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/x",
        "tiny/../../x",
        "%00",
        "C:%5cx",
        "tiny%0d%0ax",
    ):
        raw = exchange(server, request_bytes(f"/v1/models/{name}", b"", "connection: close", method="GET"))
        assert raw.startswith(b"HTTP/1.1 404 "), name
        assert b"passwd" not in raw
    for name in ("../tiny", "/etc/passwd", "tiny\n", "", "http://127.0.0.1/x"):
        check_error(server.post(TEXT, {**PROMPT, "model": name}), 404, "model")


def test_logs_cannot_be_forged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Line breaks and terminal codes in what clients choose (path, id, model) stay inside one line of the log."""
    evil = "\n2026-01-01 info forged: request status=200\x1b[2J"
    with caplog.at_level(logging.DEBUG), server.client() as client:
        client.get("/v1/models/x%0A2026-01-01%20forged%1B[2J%E2%80%A8y")
        client.post(TEXT, json={**PROMPT, "model": evil})
        client.post(TEXT, json={**PROMPT, evil: 1})
        client.post(TEXT, json={**PROMPT, "cache_salt": evil[:200], "user": evil})
    records = [record for record in caplog.records if record.name.startswith("paceline")]
    assert records
    for record in records:
        line = TextFormatter().format(record)
        assert len(line.splitlines()) == 1, line
        assert "\x1b" not in line


def test_unknown_paths_do_not_fill_the_metrics(client: httpx.Client) -> None:
    """Prometheus keeps every label for ever: paths, methods and models that clients make up must not become any."""
    before = len(client.get("/metrics").text.splitlines())
    for i in range(50):
        client.get(f"/x{i}")
        client.get(f"/v1/models/x{i}")
        client.request(f"METHOD{i}"[:6], "/v1/models")
        client.post(TEXT, json={**PROMPT, "model": f"x{i}"})
        client.post(TEXT, json={**PROMPT, f"x{i}": 1})
    assert len(client.get("/metrics").text.splitlines()) - before < 60


def test_long_predictions(client: httpx.Client) -> None:
    """Paceline's own free draft: a megabyte of it is tokenised off the event loop, and changes nothing."""
    body = {**PROMPT, "seed": 1, "temperature": 1.0}
    plain = client.post(TEXT, json=body).json()["choices"]
    assert client.post(TEXT, json={**body, "prediction": "hi " * 300_000}).json()["choices"] == plain
