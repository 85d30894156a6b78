"""Text completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from paceline.server.protocol.common import MAX_INT, Answer, RequestMetrics, SamplingBody, TokenId, Usage, left_out

MAX_PROMPTS = 256
MAX_LOGPROBS = 20

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingBody):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = Field(
        None, description="Most new tokens (default 16); 0 only with `echo`."
    )
    echo: bool | None = Field(None, description="Answer with the prompt before the new text.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Only the same as `n`.")
    suffix: Literal[""] | None = Field(None, description="Not served: leave it empty.")
    add_special_tokens: bool | None = Field(None, description="Begin a text prompt with the model's start token.")
    prediction: str | None = Field(None, description="Text that the caller expects back: a free draft.")


class CompletionLogprobs(Answer):
    """Log-probabilities of a choice, under the model's raw logits; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One sample."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = left_out()
    prompt_token_ids: list[int] | None = left_out()


class CompletionResponse(Answer):
    """Answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    seed: int = Field(description="Send it back for the same text.")
    target_transform: str | None = left_out(
        "The declared target transform that was sampled; left out for the model itself."
    )
    metrics: RequestMetrics | None = left_out()
