"""Chat completions: a conversation in, a message or tool calls out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from paceline.config import SamplingParams, StructuredOutput
from paceline.engine.constraint import Constraint
from paceline.errors import RequestError
from paceline.server.answering import FINGERPRINT, Answering
from paceline.server.chat_choice import ChatChoiceState
from paceline.server.params import new_seed, sampling_params, structured_output
from paceline.server.parsers import registry
from paceline.server.parsers.base import (
    OutputParser,
    new_call_id,
)
from paceline.server.parsers.constraint import tool_grammar
from paceline.server.parsers.tools import NO_PARAMETERS
from paceline.server.protocol.chat import (
    ChatRequest,
    ChatResponse,
    NamedToolChoice,
    Tool,
)
from paceline.server.service import Service


async def chat(service: Service, http: HTTPRequest, body: ChatRequest) -> Response:
    """Answer `POST /v1/chat/completions`.

    Raises:
        RequestError, HTTPError, EngineDeadError: nothing has been sent yet.
    """
    answering = await _start(service, http, body)
    http.state.report = answering.report
    return await answering.respond("chat.completion.chunk", lambda: _whole(answering))


async def _start(service: Service, http: HTTPRequest, body: ChatRequest) -> Answering:
    """Everything before the first token."""
    model = service.check_model(body.model)
    salt = service.salt(http, body.cache_salt)
    tools = _tools(body)
    params, field = chat_params(body, tools, service)
    http.state.ticket.extend(params.n)
    prompt, opens_reasoning = await service.off_loop(_prompt, service, body, tools)
    constraint = await _constraint(service, params, field, salt, tools)
    if params.logprobs is not None:
        await service.off_loop(service.tokens.load)
    requests = await service.off_loop(service.requests, prompt, params, salt, constraint)
    choices = {
        request.id: ChatChoiceState(
            request,
            _parser(service, tools, params, opens_reasoning),
            service.tokens,
            with_ids=bool(body.return_token_ids),
            calls_only=field == "tool_choice",
        )
        for request in requests
    }
    stream = await service.start(requests)
    assert params.seed is not None
    return Answering(
        kind="chatcmpl",
        model=model,
        body=body,
        stream=stream,
        choices=choices,
        seed=params.seed,
        report_metrics=service.reports_metrics(body),
        extra={"prompt_token_ids": prompt} if body.return_token_ids else {},
    )


def chat_params(body: ChatRequest, tools: list[Tool], service: Service) -> tuple[SamplingParams, str | None]:
    """Sampling parameters, and the field that a grammar comes from.

    Raises:
        RequestError: options that are out of range or contradict each other.
    """
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise RequestError("contradicts max_completion_tokens.", field="max_tokens", fix="Give one of them.")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("needs logprobs to be true.", field="top_logprobs")
    structured, field = structured_output(body)
    demanded = _demanded_call(body, tools, service.tool_format)
    if demanded is not None:
        if structured is not None:
            raise RequestError("cannot be combined with structured output.", field="tool_choice")
        structured, field = demanded, "tool_choice"
    params = sampling_params(
        body,
        max_n=service.config.max_n,
        structured=structured,
        max_tokens=min(body.max_completion_tokens or body.max_tokens or service.max_model_len, service.max_model_len),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        visible_tokens=service.markers if tools or service.reasoning_format else None,
        prediction=body.prediction.text() or None if body.prediction else None,
    )
    return (params if params.seed is not None else dataclasses.replace(params, seed=new_seed())), field


def _tools(body: ChatRequest) -> list[Tool]:
    """The tools that the model may call."""
    tools = body.tools or []
    if not tools and body.tool_choice not in (None, "none", "auto"):
        raise RequestError("needs tools.", field="tool_choice")
    names = [tool.function.name for tool in tools]
    for i, tool in enumerate(tools):
        kind = (tool.function.parameters or NO_PARAMETERS).get("type", "object")
        if kind != "object":
            raise RequestError('must be a schema of type "object".', field=f"tools.{i}.function.parameters")
    if len(set(names)) != len(names):
        raise RequestError("holds two functions of the same name.", field="tools")
    if isinstance(body.tool_choice, NamedToolChoice) and body.tool_choice.function.name not in names:
        raise RequestError("names a function that is not among the tools.", field="tool_choice")
    return [] if body.tool_choice == "none" else tools


def _demanded_call(body: ChatRequest, tools: list[Tool], tool_format: str | None) -> StructuredOutput | None:
    """The grammar of `tool_choice` where it demands a call."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return None
    if tool_format is None:
        raise RequestError("cannot be enforced: this server parses no tool calls.", field="tool_choice")
    names = [choice.function.name] if isinstance(choice, NamedToolChoice) else None
    plain = [tool.model_dump(exclude_none=True) for tool in tools]
    # A named function is called once, as at OpenAI: a model that may call it again often never stops.
    several = names is None and body.parallel_tool_calls is not False
    demand = tool_grammar(tool_format, plain, names, several)
    kind, value = next(iter(demand.items()))
    return StructuredOutput(**{"grammar" if kind == "ebnf" else kind: value})


async def _constraint(
    service: Service, params: SamplingParams, field: str | None, salt: str, tools: list[Tool]
) -> Constraint | None:
    """The compiled grammar; where that of a demanded call is refused, the tool that is to blame is named."""
    try:
        return await service.constraint(params, field, salt)
    except RequestError:
        if field == "tool_choice":
            deadline = time.monotonic() + service.config.grammar_timeout  # for all of them: others wait meanwhile
            for i, tool in enumerate(tools):
                if time.monotonic() > deadline:
                    break
                alone = StructuredOutput(json_schema=tool.function.parameters or NO_PARAMETERS)  # type: ignore[arg-type]
                one = dataclasses.replace(params, structured=alone)
                await service.constraint(one, f"tools.{i}.function.parameters", salt)
        raise


def _prompt(service: Service, body: ChatRequest, tools: list[Tool]) -> tuple[list[int], bool]:
    """Token ids of the conversation, and whether the template has begun the model's reasoning."""
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError("contradicts add_generation_prompt.", field="continue_final_message")
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    text = service.template.render(
        body.messages,
        tools,
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
    )
    ids = service.encode(text, add_special_tokens=False, field="messages")
    return ids, registry.opens_reasoning(text, service.reasoning_format)


def _parser(service: Service, tools: list[Tool], params: SamplingParams, opens_reasoning: bool) -> OutputParser:
    """How the text is read. A grammar describes the text from its very beginning, so it leaves no reasoning."""
    reasoning = None if params.structured is not None else service.reasoning_format
    return registry.create(
        service.tool_format if tools else None,
        reasoning,
        tools=[tool.model_dump(exclude_none=True) for tool in tools],
        new_id=new_call_id,
        starts_open=opens_reasoning,
    )


def _whole(answering: Answering) -> ChatResponse:
    states: Mapping[str, Any] = answering.choices
    return ChatResponse(
        id=answering.id,
        created=answering.created,
        model=answering.model,
        system_fingerprint=FINGERPRINT,
        choices=[states[request.id].choice() for request in answering.requests],
        usage=answering.usage(),
        seed=answering.seed,
        target_transform=answering.target_transform,
        prompt_token_ids=answering.extra.get("prompt_token_ids"),
        metrics=answering.metrics(),
    )
