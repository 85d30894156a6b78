"""The routes. Bodies are read and checked by hand: pydantic parses the bytes at once, which bounds nesting, and what
is wrong with them is answered in OpenAI's shape."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter, Path
from pydantic import BaseModel, ValidationError
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from paceline import __version__
from paceline.errors import RequestError
from paceline.server.chat import chat
from paceline.server.completions import complete
from paceline.server.errors import HTTPError, invalid_body
from paceline.server.protocol.chat import ChatRequest, ChatResponse
from paceline.server.protocol.common import ErrorBody
from paceline.server.protocol.completions import CompletionRequest, CompletionResponse
from paceline.server.protocol.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    Status,
    TokenizeRequest,
    TokenizeResponse,
    Version,
)
from paceline.server.service import Service

router = APIRouter()
M = TypeVar("M", bound=BaseModel)

Responses = dict[int | str, dict[str, Any]]
_UNAUTHORIZED: Responses = {401: {"model": ErrorBody, "description": "The API key is missing or wrong."}}
_BODY_ERRORS: Responses = {
    400: {"model": ErrorBody, "description": "The body is invalid; `param` names the field."},
    404: {"model": ErrorBody, "description": "No such model is served."},
    408: {"model": ErrorBody, "description": "The body did not arrive in time."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "The body is not declared as JSON."},
    500: {"model": ErrorBody, "description": "The server failed; other requests go on."},
    **_UNAUTHORIZED,
}
_BUSY: Responses = {
    503: {"model": ErrorBody, "description": "The queue is full, or the server is stopping; see `retry-after`."}
}
_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of a body that is parsed by hand."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def parse(http: HTTPRequest, model: type[M]) -> M:
    """The request's body.

    Raises:
        HTTPError: 415 or 400.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPError(415, "must be application/json.", field="content-type", code="unsupported_media_type")
    body = await http.body()
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error, body) from error


def json_response(body: BaseModel, status: int = 200) -> Response:
    """An answer."""
    return Response(body.model_dump_json(), status_code=status, media_type="application/json")


def service_of(http: HTTPRequest) -> Service:
    """The served model."""
    service: Service = http.app.state.service
    return service


@router.post(
    "/v1/chat/completions",
    response_model=ChatResponse,
    responses={200: {"content": _EVENTS}, **_BODY_ERRORS, **_BUSY},
    openapi_extra=takes(ChatRequest),
    tags=["generation"],
)
async def chat_completions(http: HTTPRequest) -> Response:
    """Continue a conversation."""
    return await chat(service_of(http), http, await parse(http, ChatRequest))


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    responses={200: {"content": _EVENTS}, **_BODY_ERRORS, **_BUSY},
    openapi_extra=takes(CompletionRequest),
    tags=["generation"],
)
async def completions(http: HTTPRequest) -> Response:
    """Continue one or more prompts."""
    return await complete(service_of(http), http, await parse(http, CompletionRequest))


@router.post(
    "/tokenize",
    response_model=TokenizeResponse,
    responses={**_BODY_ERRORS, **_BUSY},
    openapi_extra=takes(TokenizeRequest),
    tags=["tokens"],
)
async def tokenize(http: HTTPRequest) -> Response:
    """Token ids of a text or a conversation."""
    service, body = service_of(http), await parse(http, TokenizeRequest)
    service.check_model(body.model)
    return json_response(await service.off_loop(_tokenize, service, body))


def _tokenize(service: Service, body: TokenizeRequest) -> TokenizeResponse:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give exactly one of prompt and messages.", field="prompt")
    tokenizer = service.loaded.tokenizer
    if body.messages is not None:
        text = service.template.render(
            body.messages, body.tools or (), add_generation_prompt=body.add_generation_prompt
        )
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    else:
        ids = list(tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens))
    return TokenizeResponse(
        count=len(ids),
        max_model_len=service.max_model_len,
        tokens=ids,
        token_strs=[service.tokens.text_of(token) for token in ids] if body.return_token_strs else None,
    )


@router.post(
    "/detokenize",
    response_model=DetokenizeResponse,
    responses={**_BODY_ERRORS, **_BUSY},
    openapi_extra=takes(DetokenizeRequest),
    tags=["tokens"],
)
async def detokenize(http: HTTPRequest) -> Response:
    """Text of token ids."""
    service, body = service_of(http), await parse(http, DetokenizeRequest)
    service.check_model(body.model)
    tokenizer = service.loaded.tokenizer
    if any(token >= len(tokenizer) for token in body.tokens):
        raise RequestError("holds a token id outside the vocabulary.", field="tokens")
    return json_response(DetokenizeResponse(prompt=await service.off_loop(tokenizer.decode, body.tokens)))


@router.get("/v1/models", response_model=ModelList, responses=_UNAUTHORIZED, tags=["models"])
async def models(http: HTTPRequest) -> Response:
    """The served model under all its names."""
    service = service_of(http)
    return json_response(ModelList(data=[_card(service, name) for name in service.names]))


@router.get(
    "/v1/models/{model:path}",
    response_model=ModelCard,
    responses={404: {"model": ErrorBody, "description": "No such model is served."}, **_UNAUTHORIZED},
    tags=["models"],
)
async def model_card(http: HTTPRequest, model: str = Path(min_length=1)) -> Response:
    """One served model."""
    service = service_of(http)
    return json_response(_card(service, service.check_model(model)))


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(id=name, created=service.created, root=service.loaded.name, max_model_len=service.max_model_len)


@router.get("/health", response_model=Status, responses={503: {"model": Status}}, tags=["operations"])
async def health(http: HTTPRequest) -> Response:
    """Whether the engine lives. Open to everyone."""
    status = service_of(http).status
    return json_response(Status(status=status), 503 if status == "dead" else 200)  # type: ignore[arg-type]


@router.get("/ready", response_model=Status, responses={503: {"model": Status}}, tags=["operations"])
async def ready(http: HTTPRequest) -> Response:
    """Whether new requests are taken. Open to everyone."""
    status = service_of(http).status
    return json_response(Status(status=status), 200 if status == "ok" else 503)  # type: ignore[arg-type]


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_UNAUTHORIZED},
    tags=["operations"],
)
async def metrics(http: HTTPRequest) -> Response:
    """Prometheus metrics."""
    content, kind = service_of(http).metrics.render()
    return Response(content, headers={"content-type": kind})


@router.get("/version", response_model=Version, responses=_UNAUTHORIZED, tags=["operations"])
async def version() -> Response:
    """Paceline's version."""
    return json_response(Version(version=__version__))
