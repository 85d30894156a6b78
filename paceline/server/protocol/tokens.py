"""Token counting and the small informational answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from paceline.server.protocol.chat import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from paceline.server.protocol.common import Answer, Body, TokenId, left_out


class TokenizeRequest(Body):
    """Body of `POST /tokenize`: a text, or a conversation as the chat template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class TokenizeResponse(Answer):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = left_out()


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 17, fail_fast=True)]


class DetokenizeResponse(Answer):
    """Answer of `POST /detokenize`."""

    prompt: str


class ModelCard(Answer):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "paceline"
    root: str
    max_model_len: int


class ModelList(Answer):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(Answer):
    """Answer of `/health` and `/ready`."""

    status: Literal["ok", "loading", "draining", "dead"]


class Version(Answer):
    """Answer of `GET /version`."""

    version: str
