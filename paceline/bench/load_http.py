"""A client of any server that speaks OpenAI's API: vLLM, llama.cpp, Paceline and others are measured by the same code.

Answers are streamed. How many tokens they hold is what the server says in its usage, never the number of chunks, since
one chunk may carry several tokens. Where the server sends a usage with every chunk (vLLM, Paceline) each chunk's tokens
are exact; elsewhere the total is spread evenly over the chunks, and `Answer.exact` is false.

Every run has a cache salt of its own (`cache_salt`, which vLLM and Paceline know); a server that refuses what it does
not know is asked without. Another server's prefix cache may help it with prompts that it has seen.

Proxies of the environment are not used: a proxy's buffering would be measured along with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from paceline.bench.load import Answer, Observed
from paceline.bench.load_metrics import Counters, read_counters, sample
from paceline.bench.workload import TextPrompts, Work
from paceline.config import SamplingParams
from paceline.errors import InputError

SCRAPE_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass(frozen=True, slots=True)
class Asking:
    """How requests are put.

    Args:
        params: `temperature`, `seed` and `ignore_eos` are sent.
        chat: chat completions, otherwise completions.
        api_key: sent as a bearer token.
        timeout: seconds without a byte after which a request has failed.
    """

    params: SamplingParams
    chat: bool = True
    api_key: str | None = None
    timeout: float = 600.0


class HTTPClient:
    """Asks one server; made by `connect`.

    Args:
        name: what the setting is called.
        url: base address, with or without `/v1`.
        asking: how requests are put.
    """

    def __init__(self, name: str, url: str, asking: Asking) -> None:
        self.name = name
        self.root = url.rstrip("/").removesuffix("/v1")
        self.prompts = TextPrompts(4.0, 0.0)
        self.model = ""
        self._asking = asking
        self._extended = True
        self._session = uuid.uuid4().hex[:12]
        headers = {"authorization": f"Bearer {asking.api_key}"} if asking.api_key else {}
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(asking.timeout, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def connect(self, texts: Sequence[str]) -> None:
        """Find the model's name, whether usage comes with every chunk, and how long a token is.

        Args:
            texts: some of what will be asked.

        Raises:
            InputError: no such server, or it does not answer as OpenAI's API would.
        """
        try:
            listed = await self._http.get(f"{self.root}/v1/models")
            listed.raise_for_status()
            self.model = listed.json()["data"][0]["id"]
        except httpx.TransportError as error:
            raise self._refused(
                f"cannot be reached ({_said(error)})", "Start the server or correct the URL."
            ) from error
        except httpx.InvalidURL as error:
            raise self._refused(f"is no address ({error})", "Write NAME=http://HOST:PORT.") from error
        except httpx.HTTPStatusError as error:
            said = f"answers /v1/models with {error.response.status_code}"
            raise self._refused(said, "Check the URL, and --api-key if it wants one.") from error
        except (ValueError, LookupError, TypeError) as error:
            said = "does not list its models as OpenAI's API would"
            raise self._refused(said, "Give the address of an OpenAI-compatible server.") from error
        await self._calibrate(texts)

    async def _calibrate(self, texts: Sequence[str]) -> None:
        """Count a short and a long prompt; the difference is the length of a token, the rest the template."""
        text = "\n\n".join(texts)[:4000]
        short = await self._probe(text[:1])
        if short.error is not None:
            self._extended = False  # it may refuse fields that it does not know
            short = await self._probe(text[:1])
        long = await self._probe(text)
        for probe in (short, long):
            if probe.error is not None:
                fix = "Try the other --endpoint (chat, completions), or --no-ignore-eos for a strict server."
                raise self._refused(f"refuses a plain request: {probe.error}", fix)
        tokens = long.prompt_tokens - short.prompt_tokens
        if tokens > 0:
            self.prompts = TextPrompts((len(text) - 1) / tokens, short.prompt_tokens - 1)

    async def _probe(self, text: str) -> Answer:
        now = time.perf_counter()
        return await self.ask(Work(0, text, 1), now, now, "calibration")

    async def ask(self, work: Work, due: float, started: float, salt: str) -> Answer:
        """See `load.Client`."""
        stream = _Stream(due)
        error: str | None = None
        try:
            async with self._http.stream("POST", self._address, json=self._body(work, salt)) as response:
                if response.status_code != 200:
                    error = f"status {response.status_code}: {_reason(await response.aread())}"
                else:
                    async for line in response.aiter_lines():
                        stream.take(line, time.perf_counter())
                    error = stream.problem()
        except (httpx.HTTPError, httpx.StreamError) as failure:
            error = _said(failure)
        chunks = stream.chunks()
        return Answer(
            index=work.index,
            due=due - started,
            seconds=chunks[-1][0] if chunks and error is None else time.perf_counter() - due,
            prompt_tokens=stream.prompt_tokens,
            chunks=chunks,
            error=error,
            exact=stream.exact,
        )

    @asynccontextmanager
    async def watch(self, started: float) -> AsyncIterator[Observed]:
        """See `load.Client`; `/metrics` is scraped once a second where there is one."""
        observed = Observed()
        before = first = await self._scrape()

        async def scrape() -> None:
            nonlocal before
            while before is not None:
                await asyncio.sleep(SCRAPE_SECONDS)
                now = await self._scrape()
                if now is not None:
                    observed.timeline.add(now.at - started, sample(before, now))
                before = now or before

        task = asyncio.create_task(scrape())
        try:
            yield observed
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        last = await self._scrape()
        if first is not None and last is not None:
            if before is not None:
                observed.timeline.add(last.at - started, sample(before, last))
            observed.draft_tokens = last.growth(first, "draft_tokens")
            observed.accepted_tokens = last.growth(first, "accepted_tokens")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @property
    def _address(self) -> str:
        return f"{self.root}/v1/{'chat/completions' if self._asking.chat else 'completions'}"

    def _body(self, work: Work, salt: str) -> dict[str, Any]:
        params = self._asking.params
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": work.max_tokens,
            "temperature": params.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._extended:
            body["stream_options"]["continuous_usage_stats"] = True
            body["cache_salt"] = f"{self._session}, {salt}"  # no other run, and no other bench, has the same
        if self._asking.chat:
            body["messages"] = [{"role": "user", "content": work.prompt}]
        else:
            body["prompt"] = work.prompt
        if params.seed is not None:
            body["seed"] = params.seed + work.index
        if params.ignore_eos:
            body["ignore_eos"] = True
        return body

    async def _scrape(self) -> Counters | None:
        try:
            answer = await self._http.get(f"{self.root}/metrics", timeout=_CONNECT_SECONDS)
        except httpx.HTTPError:
            return None
        return read_counters(answer.text, time.perf_counter()) if answer.status_code == 200 else None

    def _refused(self, message: str, fix: str) -> InputError:
        return InputError(f"{self.name} ({self.root}) {message}.", field="--url", fix=fix)


class _Stream:
    """Reads the events of one streamed answer."""

    def __init__(self, due: float) -> None:
        self.prompt_tokens = 0
        self.exact = False
        self._due = due
        self._arrived: list[tuple[float, int | None]] = []  # (seconds, tokens so far if the server says so)
        self._total: int | None = None
        self._error: str | None = None
        self._done = False

    def take(self, line: str, now: float) -> None:
        """One line of the body, which arrived at `now`."""
        if not line.startswith("data:"):
            return
        data = line[5:].strip()
        if data == "[DONE]":
            self._done = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            self._error = f"sent an event that is not JSON: {data[:80]}"
            return
        if not isinstance(event, dict) or event.get("error"):
            self._error = _reason(data.encode())
            return
        usage = event.get("usage") or {}
        so_far = usage.get("completion_tokens")
        self.prompt_tokens = usage.get("prompt_tokens") or self.prompt_tokens
        choices = event.get("choices") or []
        if choices and (_has_text(choices[0]) or (so_far or 0) > (self._arrived[-1][1] or 0 if self._arrived else 0)):
            self._arrived.append((now - self._due, so_far))
        self._total = so_far if so_far is not None else self._total

    def problem(self) -> str | None:
        """Why the answer is not complete, if it is not."""
        if self._error is None and not self._done:
            return "the stream ended early"
        if self._error is None and not self._arrived:
            return "no token came"
        if self._error is None and self._total is None:
            return "the server reports no usage, so tokens cannot be counted"
        return self._error

    def chunks(self) -> tuple[tuple[float, float], ...]:
        """Seconds and tokens of every chunk; tokens are spread evenly unless the server said how many each held."""
        if not self._arrived or not self._total:
            return ()
        counts = [count for _, count in self._arrived if count is not None]
        self.exact = len(counts) == len(self._arrived) and counts[-1] == self._total
        if not self.exact:
            share = self._total / len(self._arrived)
            return tuple((seconds, share) for seconds, _ in self._arrived)
        tokens = [b - a for a, b in zip([0, *counts[:-1]], counts, strict=True)]
        pairs = zip(self._arrived, tokens, strict=True)
        return tuple((seconds, float(count)) for (seconds, _), count in pairs if count > 0)


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or any(delta.get(name) for name in _TEXT_FIELDS))


def _reason(body: bytes) -> str:
    """What an error answer says, in one short line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        content = json.loads(text)
        error = content.get("error", content)
        text = error if isinstance(error, str) else error.get("message") or text
    return " ".join(str(text).split())[:300] or "(no reason given)"


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
