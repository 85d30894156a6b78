"""Request bodies to sampling parameters."""

from __future__ import annotations

from typing import Any

from paceline.config import RequestSpeculation, SamplingParams, StructuredOutput
from paceline.engine.rng import fresh_seed
from paceline.errors import RequestError
from paceline.server.protocol.common import ResponseFormat, SamplingBody, StructuredOutputs

_SAME_NAME = (
    "temperature",
    "top_p",
    "min_p",
    "n",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)
_LEAST_PENALTY = 0.01
"""Logits are divided by it, and must stay finite."""


def sampling_params(
    body: SamplingBody, *, max_n: int, structured: StructuredOutput | None, **more: Any
) -> SamplingParams:
    """The engine's parameters of a body; fields left out or null take the engine's defaults.

    Args:
        body: the request.
        max_n: most samples of a prompt.
        structured: what `structured_output` found, or what a tool choice demands.
        **more: fields that the endpoint decides.

    Raises:
        RequestError: a value is out of range; the field is the body's.
    """
    if body.n is not None and body.n > max_n:
        raise RequestError(f"is {body.n}, and the server allows {max_n}.", field="n")
    if body.repetition_penalty is not None and body.repetition_penalty < _LEAST_PENALTY:
        raise RequestError(f"must be at least {_LEAST_PENALTY}.", field="repetition_penalty")
    given = {name: getattr(body, name) for name in _SAME_NAME if getattr(body, name) is not None}
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)
    if body.seed is not None:
        given["seed"] = body.seed % 2**64
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.speculation is not None:
        wish = body.speculation
        drafters = None if wish.drafters is None else tuple(wish.drafters)
        given["speculation"] = RequestSpeculation(wish.off, wish.cap, drafters, wish.weight, wish.deadline)
    return SamplingParams(
        logit_bias=_logit_bias(body.logit_bias or {}),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        structured=structured,
        **given,
        **{name: value for name, value in more.items() if value is not None},
    )


def structured_output(body: SamplingBody) -> tuple[StructuredOutput | None, str | None]:
    """What the text must look like, and the field that says so.

    Raises:
        RequestError: two fields ask for it, or one asks for several kinds.
    """
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        if body.structured_outputs is not None:
            raise RequestError("cannot be combined with response_format.", field="structured_outputs")
        return _of_format(wanted)
    if body.structured_outputs is None:
        return None, None
    found = _of_vllm(body.structured_outputs)
    return found, f"structured_outputs.{'json' if found.kind == 'json_schema' else found.kind}"


def _of_format(wanted: ResponseFormat) -> tuple[StructuredOutput, str]:
    if wanted.type == "json_object":
        return StructuredOutput(json_object=True), "response_format"
    field = "response_format.json_schema.schema"
    schema = wanted.json_schema.schema_ if wanted.json_schema else None
    if schema is None:
        raise RequestError("is missing.", field=field)
    return StructuredOutput(json_schema=schema), field  # type: ignore[arg-type]


def _of_vllm(wanted: StructuredOutputs) -> StructuredOutput:
    return StructuredOutput(
        json_object=bool(wanted.json_object),
        json_schema=wanted.json_,  # type: ignore[arg-type]
        regex=wanted.regex,
        choice=tuple(wanted.choice or ()),
        grammar=wanted.grammar,
        structural_tag=wanted.structural_tag,  # type: ignore[arg-type]
    )


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise RequestError("maps token ids, written as decimal numbers, to values.", field="logit_bias")
        found[int(key)] = bias
    return found


def new_seed() -> int:
    """A seed for a request without one. Answers report it, and JavaScript's numbers are exact up to 2^53 only."""
    return fresh_seed() >> 10
