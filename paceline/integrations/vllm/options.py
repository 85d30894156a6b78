"""What a user may set under `--additional-config '{"paceline": {...}}'`, and per request under `vllm_xargs`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from paceline.config import RequestSpeculation
from paceline.errors import ConfigError, SamplingParamsError

logger = logging.getLogger(__name__)
KEY = "paceline"
MODES = ("auto", "ragged", "uniform")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the scheduler and of our drafters.

    Raises:
        ConfigError: a value is out of range.
    """

    enabled: bool = True
    """False serves as stock vLLM does."""
    mode: str = "auto"
    """`ragged` gives every request its own length, `uniform` one length to the whole batch, which keeps CUDA graphs of
    decode steps; `auto` chooses by method and backend."""
    lengths: tuple[int, ...] = ()
    """Lengths that `uniform` may choose from, 0 among them; empty: those of the server's batch-size table, or none and
    the most."""
    share: float = 0.1
    """Most that a step may be lengthened for requests of greater weight."""
    protect: float | None = None
    """Most that a request's expected rate may fall below plain decoding; None: goodput decides alone."""
    metrics: bool = True
    """Whether to count on `/metrics`."""
    suffix_tokens: int = 500_000
    """Tokens of past outputs that the suffix drafter keeps, of all requests together; 0 keeps nothing."""

    def __post_init__(self) -> None:
        for name in ("enabled", "metrics"):
            _require(isinstance(getattr(self, name), bool), name, "must be true or false.")
        _require(self.mode in MODES, "mode", f"must be one of {', '.join(MODES)}.")
        lengths = self.lengths
        whole = isinstance(lengths, list | tuple) and all(map(_is_count, lengths))
        _require(whole, "lengths", "must be a list of whole numbers of at least 0.")
        object.__setattr__(self, "lengths", tuple(sorted(set(lengths))))
        for name in ("share", "protect"):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 10.0
            _require(fits or (value is None and name == "protect"), name, "must be a number between 0 and 10.")
        _require(_is_count(self.suffix_tokens), "suffix_tokens", "must be a whole number of at least 0.")

    @classmethod
    def read(cls, additional_config: object) -> Options:
        """The options in vLLM's `additional_config`.

        Raises:
            ConfigError: an unknown key, which is named with the allowed ones, or a value out of range.
        """
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ConfigError('must be an object, such as {"mode": "ragged"}.', field=_field())
        allowed = [f.name for f in fields(cls)]
        unknown = [str(key) for key in given if key not in allowed]
        if unknown:
            raise ConfigError(
                f"has no option {', '.join(unknown)}.", field=_field(), fix=f"Allowed are {', '.join(allowed)}."
            )
        return cls(**given)


def request_speculation(extra_args: Mapping[str, Any] | None) -> RequestSpeculation | None:
    """What a request's `vllm_xargs` allow: `paceline_off`, `paceline_cap`, `paceline_weight`, `paceline_deadline`.

    A value that cannot be read is logged and left out: the scheduler has no way to refuse one request.
    """
    if not extra_args:
        return None
    given = {key: extra_args[f"{KEY}_{key}"] for key in _REQUEST_KEYS if f"{KEY}_{key}" in extra_args}
    if not given:
        return None
    if "off" in given:
        given["off"] = given["off"] not in (0, "0", "false", False)
    if isinstance(given.get("cap"), float) and given["cap"].is_integer():
        given["cap"] = int(given["cap"])
    try:
        return RequestSpeculation(**given)
    except SamplingParamsError as error:
        logger.warning("vllm_xargs left out: %s", error)
        return None


_REQUEST_KEYS = ("off", "cap", "weight", "deadline")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _field(name: str = "") -> str:
    return f"additional-config.{KEY}" + (f".{name}" if name else "")


def _require(ok: bool, name: str, message: str) -> None:
    if not ok:
        raise ConfigError(message, field=_field(name))
