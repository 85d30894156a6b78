"""Configuration: frozen dataclasses that are checked once, where they are made.

Command-line defaults come from these classes; nothing is changed after construction.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import ConfigError, SamplingParamsError

MAX_N = 128
MAX_LOGPROBS = 100


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one engine runs.

    Raises:
        ConfigError: a value is impossible; the message names the field.
    """

    dtype: str = "auto"
    """`auto` (on a CPU, weights of a GGUF file in Q4_0, Q4_1 or Q8_0 stay in 4 and 8 bits; otherwise bf16 where the
    hardware has it, else fp32), `float32` or `bfloat16`."""
    activations: str = "auto"
    """What weights kept in 4 and 8 bits are multiplied with: `auto`, inputs rounded to 8 bits with a scale for every
    32 where the CPU has instructions for it, or `float32`, inputs as they are (slower)."""
    device: str = "auto"
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`."""
    max_model_len: int | None = None
    """Longest prompt + output in tokens; None takes the model's own limit, cut to what the KV cache holds."""
    max_num_seqs: int = 64
    """Most requests that run in one step."""
    max_num_batched_tokens: int = 512
    """Most committed tokens (prompt chunks and decode roots) in one step; draft tokens come on top."""
    kv_cache_memory: int | None = None
    """Bytes for the target's KV cache; None takes a fixed share of the free memory."""
    block_size: int = 16
    """Tokens in one KV block."""
    enable_prefix_caching: bool = True
    """Keep the KV of finished requests for later ones with the same beginning and the same salt."""
    speculation: str = "auto"
    """`none`, `auto` or `drafter[:key=value,...][+drafter...][@policy]`."""
    rule: str = "coupled"
    """Acceptance rule: `coupled`, `rejection` (chains), `recursive` (siblings drawn without replacement) or `multi`
    (with replacement)."""
    tree: str = "auto"
    """`auto` (each drafter's own shape, a chain under `rejection`), `chain`, or a shape for the draft model's trees:
    `NAME[:key=value,...]`, such as `rsd-s:width=4` or `branching:widths=3/2/1`."""
    num_threads: int | None = None
    """CPU threads for the network; None leaves PyTorch's choice."""
    eager: bool = False
    """On a CUDA device, launch kernels one by one instead of capturing CUDA graphs: starts sooner, decodes slower."""
    trust_remote_code: bool = False
    """Run modelling code that ships with a checkpoint. Off: such checkpoints are refused."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            _require(_is_count(getattr(self, name)), ConfigError, name, "must be a whole number of at least 1.")
        for name in ("max_model_len", "kv_cache_memory", "num_threads"):
            value = getattr(self, name)
            _require(value is None or _is_count(value), ConfigError, name, "must be a whole number of at least 1.")
        for name in ("speculation", "rule", "tree", "device"):
            _require(isinstance(getattr(self, name), str), ConfigError, name, "must be text.")
        _require(
            self.dtype in ("auto", "float32", "bfloat16"),
            ConfigError,
            "dtype",
            f"is {self.dtype!r}; take auto, float32 or bfloat16.",
        )
        _require(
            self.activations in ("auto", "float32"),
            ConfigError,
            "activations",
            f"is {self.activations!r}; take auto or float32.",
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Build a config from a mapping.

        Raises:
            ConfigError: a key is not a field of this class; the message lists the fields.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(
                f"unknown engine option(s) {', '.join(unknown)}.",
                field=unknown[0],
                fix=f"Known options: {', '.join(sorted(known))}.",
            )
        return cls(**options)


@dataclass(frozen=True, slots=True)
class RequestSpeculation:
    """What one request allows of the engine's speculation; the text does not depend on it.

    Raises:
        SamplingParamsError: a value is out of range.
    """

    off: bool = False
    """Verify no draft token for this request."""
    cap: int | None = None
    """Most draft tokens a step may verify for it."""
    drafters: tuple[str, ...] | None = None
    """Use only these of the engine's drafters."""
    weight: float = 1.0
    """What a token of this request is worth beside another request's, when they compete for verification."""
    deadline: float | None = None
    """Seconds after arrival by which the whole answer is wanted; a request that lags behind weighs more."""

    def __post_init__(self) -> None:
        _require(isinstance(self.off, bool), SamplingParamsError, "speculation.off", "must be true or false.")
        ok = self.cap is None or (isinstance(self.cap, int) and not isinstance(self.cap, bool) and self.cap >= 0)
        _require(ok, SamplingParamsError, "speculation.cap", "must be a whole number of at least 0.")
        heavy = _is_number(self.weight) and 0.01 <= self.weight <= 100.0
        _require(heavy, SamplingParamsError, "speculation.weight", "must be a number between 0.01 and 100.")
        timely = self.deadline is None or (_is_number(self.deadline) and 0.0 < self.deadline <= 1e9)
        _require(timely, SamplingParamsError, "speculation.deadline", "must be a positive number of seconds.")
        if self.drafters is not None:
            object.__setattr__(self, "drafters", _as_tuple(self.drafters, str, "speculation.drafters"))


STRUCTURED_KINDS = ("json_object", "json_schema", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the generated text must look like; exactly one field is set.

    Raises:
        SamplingParamsError: none or several are set, or a value has the wrong type.
    """

    json_object: bool = False
    """Any JSON object."""
    json_schema: str | None = None
    """A JSON schema as JSON text (or a mapping, which is turned into text)."""
    regex: str | None = None
    """A regular expression that the whole text matches."""
    choice: tuple[str, ...] = ()
    """One of these texts."""
    grammar: str | None = None
    """A grammar in GBNF-like EBNF whose start rule is `root`."""
    structural_tag: str | None = None
    """xgrammar's structural tag as JSON text (or a mapping): free text with constrained parts."""

    def __post_init__(self) -> None:
        for name in ("json_schema", "structural_tag"):
            value = getattr(self, name)
            if isinstance(value, Mapping | bool):
                object.__setattr__(self, name, json.dumps(value))
        object.__setattr__(self, "choice", _as_tuple(self.choice, str, "structured_outputs.choice"))
        _require(
            isinstance(self.json_object, bool),
            SamplingParamsError,
            "structured_outputs.json_object",
            "must be true or false.",
        )
        for name in ("json_schema", "regex", "grammar", "structural_tag"):
            value = getattr(self, name)
            field_name = f"structured_outputs.{name}"
            _require(value is None or isinstance(value, str), SamplingParamsError, field_name, "must be text.")
        given = [kind for kind in STRUCTURED_KINDS if getattr(self, kind) not in (False, None, ())]
        _require(
            len(given) == 1,
            SamplingParamsError,
            "structured_outputs",
            f"takes exactly one of {', '.join(STRUCTURED_KINDS)}; {len(given)} given.",
        )

    @property
    def kind(self) -> str:
        """Which field is set."""
        return next(kind for kind in STRUCTURED_KINDS if getattr(self, kind) not in (False, None, ()))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it stops.

    Order of the options: penalties and logit bias, `min_tokens` mask, temperature, top-k, top-p (on what top-k left,
    renormalised), min-p. Log-probabilities are those of the raw logits, before any option.

    Raises:
        SamplingParamsError: a value is out of range; the message names the field.
    """

    max_tokens: int = 256
    """Most new tokens."""
    min_tokens: int = 0
    """No stop token may be sampled and no stop string ends the text before this many new tokens."""
    n: int = 1
    """Independent samples of the same prompt."""
    temperature: float = 1.0
    """0 is greedy; ties go to the lowest token id."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 turns it off."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probability reaches this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens in prompt or output (Keskar et al. 2019)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> value added to its logit."""
    seed: int | None = None
    """Same seed, same text under the rule `coupled`; under the others a seed that comes again on one engine is a new
    draw. None takes fresh entropy, echoed in the result."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, beside the model's own."""
    ignore_eos: bool = False
    """Do not end at the model's end-of-sequence tokens."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; such a request takes no prefix-cache hits."""
    visible_tokens: tuple[int, ...] = ()
    """Special tokens whose text stays in the output, such as the markers of tool calls; others are left out."""
    prediction: str | None = None
    """Text that the caller expects back: a free draft (as in OpenAI's `prediction`)."""
    structured: StructuredOutput | None = None
    """What the text must look like; the grammar masks the target's law. Ends the text even with `ignore_eos`."""
    speculation: RequestSpeculation | None = None
    """Limits on speculation for this request alone; None leaves everything to the engine's plan."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        object.__setattr__(self, "stop", _as_tuple(self.stop, str, "stop"))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids, int, "stop_token_ids"))
        object.__setattr__(self, "visible_tokens", _as_tuple(self.visible_tokens, int, "visible_tokens"))
        for name, low, high in (
            ("max_tokens", 1, None),
            ("min_tokens", 0, None),
            ("n", 1, MAX_N),
            ("temperature", 0.0, 100.0),
            ("top_k", 0, None),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("seed", 0, 2**64 - 1),
        ):
            _check_range(name, getattr(self, name), low, high)
        _require(
            _is_number(self.top_p) and 0.0 < self.top_p <= 1.0,
            SamplingParamsError,
            "top_p",
            "must be in (0, 1].",
        )
        _require(
            _is_number(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 10.0,
            SamplingParamsError,
            "repetition_penalty",
            "must be in (0, 10].",
        )
        _require(
            self.min_tokens <= self.max_tokens,
            SamplingParamsError,
            "min_tokens",
            "must not exceed max_tokens.",
        )
        _require(all(self.stop), SamplingParamsError, "stop", "must not contain an empty string.")
        _require(isinstance(self.ignore_eos, bool), SamplingParamsError, "ignore_eos", "must be true or false.")
        _require(
            self.prediction is None or isinstance(self.prediction, str),
            SamplingParamsError,
            "prediction",
            "must be text.",
        )
        for name, kind in (("structured", StructuredOutput), ("speculation", RequestSpeculation)):
            value = getattr(self, name)
            _require(value is None or isinstance(value, kind), SamplingParamsError, name, f"must be {kind.__name__}.")
        for token, bias in self.logit_bias.items():
            _require(
                isinstance(token, int) and token >= 0 and _is_number(bias) and -100.0 <= bias <= 100.0,
                SamplingParamsError,
                "logit_bias",
                "must map token ids to values between -100 and 100.",
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before temperature, so that a plain argmax of the row is not enough."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
        )

    @property
    def law_is_plain(self) -> bool:
        """Whether the law of a token is that of its logits and temperature alone."""
        return not self.edits_logits and (self.greedy or (self.top_k <= 0 and self.top_p >= 1.0 and not self.min_p))


def _require(ok: bool, error: type[ConfigError] | type[SamplingParamsError], name: str, message: str) -> None:
    if not ok:
        raise error(message, field=name)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _check_range(name: str, value: Any, low: float, high: float | None) -> None:
    if value is None and name in ("logprobs", "prompt_logprobs", "seed"):
        return
    bound = f"at least {low}" if high is None else f"between {low} and {high}"
    whole = isinstance(low, int)
    fits = _is_number(value) and value >= low and (high is None or value <= high)
    if not fits or (whole and not isinstance(value, int)):
        kind = "a whole number" if whole else "a number"
        raise SamplingParamsError(f"is {value!r}; it must be {kind} {bound}.", field=name)


def _as_tuple(value: Any, kind: type, name: str) -> tuple[Any, ...]:
    if isinstance(value, kind):
        return (value,)
    if value is None:
        return ()
    items = tuple(value)
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
        raise SamplingParamsError(f"must hold {kind.__name__} values only.", field=name)
    return items
