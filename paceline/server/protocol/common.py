"""What chat and text completions share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

MAX_STOP = 16
MAX_STOP_CHARS = 512
MAX_BIASES = 1024
MAX_INT = 2**31 - 1


class Body(BaseModel):
    """A request body: types are not converted, and unknown fields are refused, so that a typing error is noticed."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Answer(BaseModel):
    """A response body."""

    model_config = ConfigDict(extra="forbid")


def left_out(description: str | None = None) -> Any:
    """A field that is left out of the answer when it is None."""
    return Field(None, exclude_if=lambda value: value is None, description=description)


TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage of the whole request.")
    continuous_usage_stats: bool | None = Field(None, description="Send the usage so far with every chunk (vLLM's).")
    include_obfuscation: bool | None = Field(None, description="Accepted and ignored.")


class JSONSchemaFormat(Body):
    """The `json_schema` of a response format."""

    name: str = Field("", max_length=256)
    description: str | None = None
    schema_: dict[str, JsonValue] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: exactly one of the kinds."""

    json_: dict[str, JsonValue] | str | bool | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    structural_tag: dict[str, JsonValue] | str | None = None


class SpeculationWish(Body):
    """Paceline's `speculation`: what this request allows of it. The text does not depend on that."""

    off: bool = Field(False, description="Verify no draft token for this request.")
    cap: Annotated[int, Field(ge=0, le=MAX_INT)] | None = Field(
        None, description="Most draft tokens that a step may verify for this request."
    )
    drafters: Annotated[list[str], Field(max_length=16)] | None = Field(
        None, description="Use only these of the engine's drafters."
    )
    weight: Annotated[float, Field(ge=0.01, le=100.0)] = Field(
        1.0, description="What a token of this request is worth beside another's when they compete for verification."
    )
    deadline: Annotated[float, Field(gt=0.0, le=1e9)] | None = Field(
        None, description="Seconds after arrival by which the whole answer is wanted; who lags behind weighs more."
    )
    metrics: bool = Field(False, description="Report `metrics.speculative_decoding` with the answer.")


def _spell_out(value: Any) -> Any:
    """`"off"` is short for `{"off": true}`."""
    if isinstance(value, str) and value != "off":
        raise ValueError('must be an object or "off"')
    return {"off": True} if value == "off" else value


class SamplingBody(Body):
    """Sampling options of both endpoints."""

    model: str | None = Field(None, description="A served model's name; the first one by default.")
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=MAX_BIASES)] | None
    ) = Field(None, description="Token id (as text) -> value added to its logit.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and ignored.")

    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = Field(None, description="0 or -1 turns it off.")
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: Literal[True] | None = Field(None, description="Only true: text never has special tokens.")
    spaces_between_special_tokens: bool | None = Field(None, description="Accepted and ignored: there are none.")
    include_stop_str_in_output: Literal[False] | None = Field(None, description="Only false.")
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Requests with different salts share no cached state."
    )
    return_token_ids: bool | None = Field(None, description="Report the token ids of prompt and output.")
    speculation: Annotated[SpeculationWish | None, BeforeValidator(_spell_out)] = Field(
        None,
        description="Limits on speculation for this request alone.",
        json_schema_extra={"anyOf": [{"$ref": "#/$defs/SpeculationWish"}, {"const": "off"}, {"type": "null"}]},
    )


class PromptTokensDetails(Answer):
    """Part of `usage`."""

    cached_tokens: int


class CompletionTokensDetails(Answer):
    """Part of `usage`."""

    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(Answer):
    """Tokens of a request, over all its samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class SpeculativeDecoding(Answer):
    """Speculation statistics of one request, in the shape that AIPerf reads from vLLM."""

    mean_acceptance_length: float = Field(description="1 + accepted tokens per speculating step.")
    draft_acceptance_rate: float = Field(description="Accepted over drafted tokens.")
    acceptance_histogram: list[int] = Field(
        description="Entry j, from 0 to num_spec_tokens: speculating steps that accepted j draft tokens."
    )
    num_spec_steps: int = Field(description="Steps that verified at least one draft token.")
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int = Field(description="Most draft tokens verified in one step.")
    accepted_by: dict[str, int] = Field(description="Accepted tokens by the drafter that guessed them.")


class RequestMetrics(Answer):
    """Reported where the request asked for it."""

    speculative_decoding: SpeculativeDecoding


class ErrorInfo(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """OpenAI's error shape."""

    error: ErrorInfo
