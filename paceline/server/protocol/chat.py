"""Chat completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, field_validator

from paceline.server.protocol.common import MAX_INT, Answer, Body, RequestMetrics, SamplingBody, Usage, left_out

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20
MAX_VARIABLES = 64


class TextPart(Body):
    """Part of a message's content. Only text is served: images and audio are refused."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Body):
    """A call that the model made earlier."""

    name: str = Field(max_length=256)
    arguments: str
    parsed_arguments: JsonValue = Field(None, description="Accepted and ignored: OpenAI's client sends both.")


class ToolCallMessage(Body):
    """A tool call inside an assistant message."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, description="Accepted and ignored: a streamed call keeps it.")


MAX_PARTS = 4096
Parts = Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(Body):
    """One message of the conversation."""

    role: Role
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    parsed: JsonValue = Field(None, description="Accepted and ignored: OpenAI's client sends it beside the content.")
    annotations: list[JsonValue] | None = Field(None, description="Accepted and ignored.")
    audio: None = Field(None, description="Only null, as OpenAI's answers have it.")
    function_call: None = Field(None, description="Only null, as OpenAI's answers have it.")

    def text(self) -> str:
        """The content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text or part.refusal or "" for part in self.content)


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = Field(None, description="JSON schema of the arguments.")
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    """The function of a named tool choice."""

    name: str


class NamedToolChoice(Body):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction


class Prediction(Body):
    """OpenAI's predicted output: text that the caller expects back, a free draft."""

    type: Literal["content"]
    content: str | Parts

    def text(self) -> str:
        """The prediction as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


def _few(value: object) -> object:
    """Refuse many entries before each of them is looked at."""
    if isinstance(value, dict) and len(value) > MAX_VARIABLES:
        raise ValueError(f"may have {MAX_VARIABLES} entries")
    return value


class ChatRequest(SamplingBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = Field(
        None, description="Most new tokens; the room that the context leaves by default."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    prediction: Prediction | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str] | None, BeforeValidator(_few)] = Field(
        None, description="Variables for the model's chat template, such as enable_thinking."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = Field(
        None, description="Only text."
    )
    metadata: dict[str, JsonValue] | None = Field(None, description="Accepted and ignored.")
    store: bool | None = Field(None, description="Accepted and ignored: nothing is stored.")
    service_tier: str | None = Field(None, description="Accepted and ignored.")
    reasoning_effort: str | None = Field(None, description="Handed to the chat template.")
    verbosity: str | None = Field(None, description="Accepted and ignored.")
    safety_identifier: str | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: str | None = Field(None, description="Accepted and ignored: equal prefixes are found anyway.")
    prompt_cache_retention: str | None = Field(None, description="Accepted and ignored.")
    prompt_cache_options: dict[str, JsonValue] | None = Field(None, description="Accepted and ignored.")
    include_reasoning: Literal[True] | None = Field(None, description="Only true: reasoning is never left out.")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _no_template(cls, value: dict[str, bool | int | float | str] | None) -> object:
        reserved = {"chat_template", "messages", "tools", "documents", "conversation", "tokenize", "return_dict"}
        for name in value or ():
            if name in reserved or not name.isidentifier():
                raise ValueError(f"{name!r} cannot be set by a request")
        return value


class TokenLogprob(Answer):
    """Log-probability of one token, under the model's raw logits."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """The same with the likeliest alternatives."""

    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(Answer):
    """Log-probabilities of a choice."""

    content: list[ContentLogprob] | None
    refusal: None = None


class CalledFunction(Answer):
    """Function and arguments (JSON text) of a tool call."""

    name: str
    arguments: str


class AnsweredToolCall(Answer):
    """A tool call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(Answer):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = left_out()
    tool_calls: list[AnsweredToolCall] | None = left_out()


ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(Answer):
    """One sample."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: list[int] | None = left_out()


class ChatResponse(Answer):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    seed: int = Field(description="Send it back for the same text.")
    target_transform: str | None = left_out(
        "The declared target transform that was sampled; left out for the model itself."
    )
    prompt_token_ids: list[int] | None = left_out()
    metrics: RequestMetrics | None = left_out()
