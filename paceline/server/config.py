"""How the server listens and what it lets in. Frozen, checked where it is made; the limits are the defaults for
servers that strangers can reach."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.config import MAX_N
from paceline.errors import ConfigError
from paceline.server.parsers.registry import reasoning_parser_names, tool_parser_names

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of `paceline serve` that are not the engine's.

    Raises:
        ConfigError: a value is impossible; the message names the field.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: tuple[str, ...] = ()
    """Keys that clients may send as `Authorization: Bearer KEY`; none: everyone is let in."""
    served_model_name: tuple[str, ...] = ()
    """Names that requests may use; the first one is answered with. Default: the model's own."""
    max_queued_requests: int = 256
    """Most samples that wait beside the `max_num_seqs` running ones; more are answered with 503."""
    tenant_header: str | None = None
    """Request header that names the tenant; tenants share no cached state. Set it in a trusted proxy."""
    tool_call_parser: str = "auto"
    """How tool calls are written: a format's name, `auto` (from the chat template) or `none`."""
    reasoning_parser: str = "auto"
    """How reasoning is marked: a format's name, `auto` or `none`."""
    per_request_spec_decode_metrics: str = "none"
    """`summary` reports `metrics.speculative_decoding` with every answer; `none` only where a request asks."""
    max_n: int = 16
    """Most samples of one prompt."""
    max_body_bytes: int = 4 << 20
    """Largest request body."""
    read_timeout: float = 30.0
    """Seconds a client may take to send its body."""
    write_timeout: float = 120.0
    """Seconds a client may leave a piece of its answer unread before its request is cancelled."""
    grammar_timeout: float = 5.0
    """Seconds that compiling a schema, regex or grammar may take."""
    max_grammar_bytes: int = 64 << 10
    """Longest schema, regex or grammar."""
    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_format: str = "text"
    """`text` or `json` (one object a line)."""

    def __post_init__(self) -> None:
        for name in ("api_key", "served_model_name"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
            if not all(isinstance(item, str) and item.strip() for item in getattr(self, name)):
                raise ConfigError("must not be empty.", field=name)
        self._check_numbers()
        for name, known in (
            ("log_level", LOG_LEVELS),
            ("log_format", LOG_FORMATS),
            ("tool_call_parser", ("auto", "none", *tool_parser_names())),
            ("reasoning_parser", ("auto", "none", *reasoning_parser_names())),
            ("per_request_spec_decode_metrics", ("none", "summary")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"is {getattr(self, name)!r}; take {', '.join(known)}.", field=name)
        if any(not key.isascii() for key in self.api_key):
            raise ConfigError("must be ASCII.", field="api_key")
        header = self.tenant_header
        if header is not None and not (header.isascii() and header.replace("-", "").replace("_", "").isalnum()):
            raise ConfigError(f"{header!r} is not a header name.", field="tenant_header")

    def _check_numbers(self) -> None:
        whole = {
            "port": (0, 65535),
            "max_queued_requests": (0, 1 << 20),
            "max_n": (1, MAX_N),
            "max_body_bytes": (1024, 1 << 30),
            "max_grammar_bytes": (16, 1 << 24),
        }
        for name, (low, high) in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"is {value!r}; it must be a whole number from {low} to {high}.", field=name)
        for name in ("read_timeout", "write_timeout", "grammar_timeout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 86400:
                raise ConfigError(f"is {value!r}; it must be a number of seconds above 0.", field=name)
