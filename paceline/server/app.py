"""The ASGI application."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from paceline import __version__
from paceline.errors import PacelineError
from paceline.server.errors import HTTPError, error_body, error_response
from paceline.server.middleware import OPEN_PATHS, Gate
from paceline.server.protocol.chat import ChatRequest
from paceline.server.protocol.completions import CompletionRequest
from paceline.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from paceline.server.routes import router
from paceline.server.service import Service

logger = logging.getLogger(__name__)
_BODIES: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


def create_app(service: Service) -> ASGIApp:
    """The application behind its gate. It closes the service when it shuts down.

    Args:
        service: the served model.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="Paceline",
        version=__version__,
        description="OpenAI's API over lossless speculative decoding.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(router)
    for kind in (PacelineError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    secured = bool(service.config.api_key)
    app.openapi = lambda: _openapi(app, secured)  # type: ignore[method-assign]
    return Gate(app, service.config, service.admission, service.metrics.on_http, service.metrics.on_rejected)


async def _answer_error(http: HTTPRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = {404: "there is no such route.", 405: "the route does not take this method."}
        headers: Mapping[str, str] = error.headers or {}
        known = HTTPError(error.status_code, message.get(error.status_code, "the request is invalid."))
        return error_response(known, headers)
    if isinstance(error, RequestValidationError):
        return error_response(HTTPError(400, "a path or query parameter is invalid.", code="invalid_value"))
    if isinstance(error, PacelineError):
        status, body = error_body(error)
        service: Service = http.app.state.service
        service.metrics.on_rejected(body["error"]["code"] or "invalid")
        if status == 500:
            logger.error("a request failed", exc_info=error, extra={"request_id": http.state.request_id})
    return error_response(error)


def _openapi(app: FastAPI, secured: bool) -> dict[str, Any]:
    """FastAPI's document with the bodies that are parsed by hand, and without its own 422."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema(
        [(model, "validation") for model in _BODIES], ref_template="#/components/schemas/{model}"
    )
    schemas = document["components"]["schemas"]
    schemas.update(bodies["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if secured and path not in OPEN_PATHS:
                operation["security"] = [{"bearer": []}]
    if secured:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    # A field that spells out its own schema names its parts as pydantic does.
    app.openapi_schema = json.loads(json.dumps(document).replace('"#/$defs/', '"#/components/schemas/'))
    return app.openapi_schema
