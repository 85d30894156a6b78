"""Text completions: prompts (texts or token ids) in, their continuations out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from paceline.config import SamplingParams
from paceline.engine.request import Request
from paceline.engine.types import RequestOutput, TokenLogprobs
from paceline.errors import RequestError
from paceline.server.answering import FINGERPRINT, Answering
from paceline.server.params import new_seed, sampling_params, structured_output
from paceline.server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from paceline.server.service import Service
from paceline.server.tokens import TokenTexts, finite

_DEFAULT_TOKENS = 16


async def complete(service: Service, http: HTTPRequest, body: CompletionRequest) -> Response:
    """Answer `POST /v1/completions`.

    Raises:
        RequestError, HTTPError, EngineDeadError: nothing has been sent yet.
    """
    answering = await _start(service, http, body)
    http.state.report = answering.report
    return await answering.respond("text_completion", lambda: _whole(answering))


async def _start(service: Service, http: HTTPRequest, body: CompletionRequest) -> Answering:
    """Everything before the first token."""
    model = service.check_model(body.model)
    salt = service.salt(http, body.cache_salt)
    params, field = completion_params(body, service)
    prompts = _as_many(body)
    http.state.ticket.extend(params.n * len(prompts))
    encoded = await service.off_loop(lambda: [_encode(service, body, prompt) for prompt in prompts])
    constraint = await service.constraint(params, field, salt)
    if params.logprobs is not None:
        await service.off_loop(service.tokens.load)
    assert params.seed is not None
    choices: dict[str, CompletionChoiceState] = {}
    requests: list[Request] = []
    for i, (ids, text) in enumerate(encoded):
        # Equal prompts in one request are independent samples: each has a seed of its own.
        own = dataclasses.replace(params, seed=(params.seed + i) % 2**64)
        for request in service.requests(ids, own, salt, constraint):
            index = i * params.n + request.sample_index
            choices[request.id] = CompletionChoiceState(request, index, text, body, service.tokens)
            requests.append(request)
    stream = await service.start(requests)
    return Answering(
        kind="cmpl",
        model=model,
        body=body,
        stream=stream,
        choices=choices,
        seed=params.seed,
        report_metrics=service.reports_metrics(body),
        hidden=len(requests) if body.max_tokens == 0 else 0,
    )


def completion_params(body: CompletionRequest, service: Service) -> tuple[SamplingParams, str | None]:
    """Sampling parameters, and the field that a grammar comes from.

    Raises:
        RequestError: options that are out of range or contradict each other.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("must equal n: samples are not ranked here.", field="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("may be 0 only with echo.", field="max_tokens")
    structured, field = structured_output(body)
    params = sampling_params(
        body,
        max_n=service.config.max_n,
        structured=structured,
        max_tokens=_DEFAULT_TOKENS if body.max_tokens is None else min(max(body.max_tokens, 1), service.max_model_len),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        prediction=body.prediction or None,
    )
    return (params if params.seed is not None else dataclasses.replace(params, seed=new_seed())), field


def _as_many(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _encode(service: Service, body: CompletionRequest, prompt: str | list[int]) -> tuple[list[int], str]:
    """Token ids and text of a prompt (the text only where it is echoed)."""
    if isinstance(prompt, str):
        return service.encode(prompt, add_special_tokens=body.add_special_tokens is not False, field="prompt"), prompt
    service.check_length(prompt, "prompt")
    known = len(service.loaded.tokenizer)
    if any(token >= known for token in prompt):
        raise RequestError("holds a token id outside the vocabulary.", field="prompt")
    return prompt, service.loaded.tokenizer.decode(prompt) if body.echo else ""


class CompletionChoiceState:
    """One sample and everything said so far.

    Args:
        request: the engine's.
        index: its place in the answer.
        prompt: the prompt's text.
        body: the HTTP request.
        tokens: token texts, for log-probabilities.
    """

    def __init__(self, request: Request, index: int, prompt: str, body: CompletionRequest, tokens: TokenTexts) -> None:
        self.request = request
        self.index = index
        self.reasoning_tokens = 0
        self.text: list[str] = []
        self.logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self.finish_reason: str | None = None
        self._prompt = prompt
        self._echo = bool(body.echo)
        self._hides_output = body.max_tokens == 0
        self._with_ids = bool(body.return_token_ids)
        self._tokens = tokens
        self._offset = 0
        self._begun = False

    def add(self, news: RequestOutput) -> dict[str, Any] | None:
        """Take news in; the choice of a chunk."""
        first, self._begun = not self._begun, True
        text = self._prompt if first and self._echo else ""
        logprobs: list[TokenLogprobs | None] = []
        if first and news.prompt_logprobs:
            logprobs += [TokenLogprobs(self.request.token_ids[0], 0.0), *news.prompt_logprobs[1:]]
        if not self._hides_output:
            text += news.text
            logprobs += news.logprobs
        self.text.append(text)
        if news.finish_reason is not None:
            self.finish_reason = "length" if self._hides_output else news.finish_reason.value
        ids = [] if self._hides_output else list(news.token_ids)
        if not (text or logprobs or self.finish_reason or (self._with_ids and ids)):
            return None
        wanted = self.request.params.logprobs is not None
        choice = {
            "index": self.index,
            "text": text,
            "logprobs": self._take(logprobs, first and bool(news.prompt_logprobs)).model_dump() if wanted else None,
            "finish_reason": self.finish_reason,
        }
        if self._with_ids:
            choice["token_ids"] = ids
            if first:
                choice["prompt_token_ids"] = self.request.token_ids[: self.request.prompt_len]
        return choice

    def _take(self, items: list[TokenLogprobs | None], starts_text: bool) -> CompletionLogprobs:
        """Text completions' form of log-probabilities; the very first token of an echoed prompt has none."""
        new = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for i, item in enumerate(items):
            assert item is not None
            given = not (starts_text and i == 0)
            token = self._tokens.text_of(item.token_id)
            new.tokens.append(token)
            new.token_logprobs.append(finite(item.logprob) if given else None)
            new.top_logprobs.append(self._tokens.top(item) if given else None)
            new.text_offset.append(self._offset)
            self._offset += len(token)
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            getattr(self.logprobs, name).extend(getattr(new, name))
        return new

    def choice(self) -> CompletionChoice:
        """The finished choice."""
        request = self.request
        ids = [] if self._hides_output else request.output_ids
        return CompletionChoice(
            index=self.index,
            text="".join(self.text),
            logprobs=self.logprobs if request.params.logprobs is not None else None,
            finish_reason=self.finish_reason,  # type: ignore[arg-type]
            token_ids=ids if self._with_ids else None,
            prompt_token_ids=request.token_ids[: request.prompt_len] if self._with_ids else None,
        )


def _whole(answering: Answering) -> CompletionResponse:
    states: Mapping[str, Any] = answering.choices
    return CompletionResponse(
        id=answering.id,
        created=answering.created,
        model=answering.model,
        system_fingerprint=FINGERPRINT,
        choices=[states[request.id].choice() for request in answering.requests],
        usage=answering.usage(),
        seed=answering.seed,
        target_transform=answering.target_transform,
        metrics=answering.metrics(),
    )
