"""`paceline bench load --url`: against small servers that speak OpenAI's API in several dialects."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from paceline.bench import load_http, load_metrics
from paceline.bench.load import Answer
from paceline.bench.workload import Work
from paceline.cli.main import main
from paceline.config import SamplingParams
from paceline.errors import InputError

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=5)
CHARACTERS, TEMPLATE = 5, 7
"""Of the fake servers' tokens, and of their chat template."""


class Server:
    """An OpenAI server whose manners are its attributes; one chunk carries up to `step` tokens."""

    def __init__(self) -> None:
        self.step = 3
        self.knows_extensions = True
        self.forbids_extensions = False
        self.reports_usage = True
        self.breaks: Callable[[int], bool] = lambda _number: False
        self.refuses: Callable[[int], bool] = lambda _number: False
        self.metrics: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.drafted = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def reply(self, status: int, content: str, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content.encode())

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.reply(200, '{"object": "list", "data": [{"id": "tiny"}, {"id": "adapter"}]}')
                elif self.path == "/metrics" and server.metrics is not None:
                    self.reply(200, server.metrics.format(drafted=server.drafted, accepted=server.drafted // 2))
                else:
                    self.reply(404, "{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                number = len(server.bodies)
                unknown = {"cache_salt"} & set(body)
                if server.forbids_extensions and unknown:
                    self.reply(400, json.dumps({"error": {"message": f"unknown field {unknown}"}}))
                elif server.refuses(number):
                    self.reply(503, '{"error": {"message": "no room"}}')
                else:
                    server.stream(self, body, broken=server.breaks(number))

        return Handler

    def stream(self, out: BaseHTTPRequestHandler, body: dict[str, Any], *, broken: bool) -> None:
        chat = "messages" in body
        text = body["messages"][0]["content"] if chat else body["prompt"]
        prompt = TEMPLATE * chat + -(-len(text) // CHARACTERS)
        continuous = self.knows_extensions and body["stream_options"].get("continuous_usage_stats")
        out.send_response(200)
        out.send_header("content-type", "text/event-stream")
        out.end_headers()

        def send(choices: list[Any], done: int, usage: bool) -> None:
            event: dict[str, Any] = {"choices": choices}
            if usage:
                event["usage"] = {"prompt_tokens": prompt, "completion_tokens": done}
            out.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        if chat:
            send([{"delta": {"role": "assistant", "content": ""}}], 0, bool(continuous))
        done = 0
        while done < body["max_tokens"]:
            done = min(done + self.step, body["max_tokens"])
            self.drafted += 2 * (self.step - 1)
            send([{"delta": {"content": "x"}} if chat else {"text": "x"}], done, bool(continuous))
            time.sleep(0.002)
            if broken:
                return
        if self.reports_usage:
            send([], done, usage=True)
        out.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def asked(server: Server, work: Work, **asking: Any) -> tuple[load_http.HTTPClient, Answer]:
    """A connected client and its answer to one request."""

    async def body() -> tuple[load_http.HTTPClient, Answer]:
        client = load_http.HTTPClient("s", server.url + "/v1/", load_http.Asking(PARAMS, **asking))
        try:
            await client.connect(["a question of some length " * 4, "another one"])
            now = time.perf_counter()
            return client, await client.ask(work, now, now - 1.0, "salt")
        finally:
            await client.close()

    return asyncio.run(body())


def test_tokens_are_counted_not_chunks(server: Server) -> None:
    client, answer = asked(server, Work(2, "how are you?", 8))
    assert client.model == "tiny"
    assert [tokens for _, tokens in answer.chunks] == [3, 3, 2]
    assert (answer.output_tokens, answer.prompt_tokens, answer.exact) == (8, TEMPLATE + 3, True)
    assert answer.error is None
    assert answer.due == pytest.approx(1.0, abs=0.1)
    assert 0 < answer.chunks[0][0] < answer.chunks[-1][0] == answer.seconds
    body = server.bodies[-1]
    assert (body["max_tokens"], body["temperature"], body["seed"], body["ignore_eos"]) == (8, 0.0, 7, True)
    assert body["cache_salt"].endswith("salt")


def test_without_running_usage_tokens_are_spread(server: Server) -> None:
    server.knows_extensions = False
    _, answer = asked(server, Work(0, "how are you?", 8))
    assert [tokens for _, tokens in answer.chunks] == pytest.approx([8 / 3] * 3)
    assert (answer.output_tokens, answer.exact) == (8, False)


def test_a_strict_server_is_asked_without_extensions(server: Server) -> None:
    server.forbids_extensions = True
    _, answer = asked(server, Work(0, "how are you?", 8))
    assert answer.output_tokens == 8
    assert "cache_salt" not in server.bodies[-1]
    assert server.bodies[-1]["stream_options"] == {"include_usage": True}


def test_completions_and_keys(server: Server) -> None:
    _, answer = asked(server, Work(0, "how are you?", 4), chat=False, api_key="secret")
    assert (answer.output_tokens, answer.prompt_tokens) == (4, 3)
    assert server.bodies[-1]["prompt"] == "how are you?"
    assert server.headers[-1]["authorization"] == "Bearer secret"


def test_the_server_says_how_long_a_token_is(server: Server) -> None:
    client, _ = asked(server, Work(0, "x", 1))
    prompt = client.prompts.sized(["abcdefgh " * 100, "b"], 60)
    assert len(prompt) / CHARACTERS + TEMPLATE == pytest.approx(60, abs=1.5)


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        ({"breaks": lambda number: number > 2}, "ended early"),
        ({"refuses": lambda number: number > 2}, "status 503: no room"),
    ],
)
def test_failures_say_why(manner: dict[str, Any], says: str, server: Server) -> None:
    for name, value in manner.items():
        setattr(server, name, value)
    _, answer = asked(server, Work(0, "x", 8))
    assert says in str(answer.error)


def test_a_server_without_usage_is_refused(server: Server) -> None:
    server.reports_usage = server.knows_extensions = False
    with pytest.raises(InputError, match="no usage"):
        asked(server, Work(0, "x", 8))


METRICS = """# HELP vllm:num_requests_running x
vllm:num_requests_running{{engine="0"}} 2.0
vllm:num_requests_running{{engine="1"}} 1.0
vllm:generation_tokens_total{{engine="0"}} {drafted}
vllm:spec_decode_num_drafts_total 4
vllm:spec_decode_num_draft_tokens_total {drafted}
vllm:spec_decode_num_accepted_tokens_total {accepted}.0
vllm:spec_decode_num_accepted_tokens_created 1.7e+09
"""


def test_metrics_are_read_by_name_and_added_up() -> None:
    before = load_metrics.read_counters(METRICS.format(drafted=10, accepted=4), 1.0)
    now = load_metrics.read_counters(METRICS.format(drafted=30, accepted=9), 3.0)
    assert now.growth(before, "draft_tokens") == 20
    assert now.growth(before, "waiting") is None
    found = load_metrics.sample(before, now)
    assert found["running"] == (3.0, 1.0)
    assert found["tokens_per_second"] == (20.0, 2.0)
    assert found["acceptance/drafts"] == (5.0, 20.0)
    assert found["draft_nodes"] == (20.0, 15.0)
    ours = (
        'paceline:drafted_tokens_total{drafter="ngram",engine="0"} 8\npaceline:accepted_tokens_total{drafter="ngram"} 2'
    )
    empty = load_metrics.Counters(0.0)
    assert load_metrics.sample(empty, load_metrics.read_counters(ours, 1.0)) == {"acceptance/ngram": (2.0, 8.0)}
    llama = load_metrics.read_counters("llamacpp:requests_processing 3\nllamacpp:tokens_predicted_total 50\n", 2.0)
    assert load_metrics.sample(empty, llama) == {"running": (3.0, 1.0), "tokens_per_second": (50.0, 2.0)}


def command(*servers: Server, more: tuple[str, ...] = ()) -> list[str]:
    urls = [part for i, s in enumerate(servers) for part in ("--url", f"s{i}={s.url}")]
    return ["bench", "load", *urls, "--max-tokens", "8", *more]


def test_servers_are_compared(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_http, "SCRAPE_SECONDS", 0.02)
    other = Server()
    other.step, other.metrics, other.knows_extensions = 4, METRICS, False
    out, page = tmp_path / "l.json", tmp_path / "l.html"
    more = ("--users", "2", "--requests", "6", "--repeats", "2", "--json", str(out), "--html", str(page))
    try:
        assert main(command(server, other, more=more)) == 0
    finally:
        other.close()
    result = json.loads(out.read_text())
    assert (result["mode"], result["settings"], result["models"]["s1"]) == ("http", ["s0", "s1"], "tiny")
    assert [row["output_tokens"] for row in result["rows"]] == [48] * 4
    first, second = result["summary"]
    assert first["draft_tokens"] is None
    assert second["draft_tokens"] == 2 * 6 * 2 * 6
    assert second["mean_accepted_length"] == pytest.approx(96 / (96 - 72))
    assert (first["exact_token_times"], second["exact_token_times"]) == (True, False)
    assert {item["setting"] for item in result["over_time"]} == {"s1"}
    assert "even spread" in capsys.readouterr().out
    assert "s1: " in page.read_text()
    salts = [body["cache_salt"] for body in server.bodies]
    assert len(set(salts)) == 4, "calibration, warm-up, and every repeat have salts of their own"


def test_a_server_that_cannot_be_reached(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.close()
    assert main(command(server, more=("--users", "1"))) == 2
    error = capsys.readouterr().err
    assert "s0" in error
    assert server.url in error
    assert "cannot be reached" in error


def test_something_else_at_the_address(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "load", "--url", f"a={server.url}/elsewhere", "--users", "1"]) == 2
    assert "404" in capsys.readouterr().err


def test_some_failures_are_counted_and_all_are_an_error(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.refuses = lambda number: number > 3 and number % 2 == 0
    assert main(command(server, more=("--users", "1", "--requests", "6"))) == 0
    assert "3 request(s) failed, the first with s0: status 503: no room" in capsys.readouterr().out
    server.bodies.clear()
    server.refuses = lambda number: number > 2
    assert main(command(server, more=("--users", "1", "--requests", "6"))) == 1
    assert "every request failed" in capsys.readouterr().err
