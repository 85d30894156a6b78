"""`paceline serve`: an OpenAI-compatible server.

Every setting can be given as a flag, as an environment variable or in a config file; a flag wins over the environment,
the environment over the file.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.config import EngineConfig
from paceline.errors import ConfigError
from paceline.server.parsers.registry import reasoning_parser_names, tool_parser_names

if TYPE_CHECKING:
    from paceline.server.config import ServerConfig

EPILOG = """\
examples:
  paceline serve smollm2-135m --port 8000
  paceline serve ./my-model --api-key SECRET --served-model-name my-model --speculation ngram+recycling
  PACELINE_API_KEY=SECRET paceline serve --config paceline.toml
  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Name three rivers."}]}'

Every option is also an environment variable (--max-model-len: PACELINE_MAX_MODEL_LEN, the model: PACELINE_MODEL) and
a key of the config file (max_model_len = 4096; model = "smollm2-135m"). Flags win over the environment, the
environment over the file. SIGTERM finishes what runs and refuses the rest; a second one stops at once.
"""


def _size(text: str) -> int:
    """Bytes, with an optional unit: 1073741824, 512MiB, 2GB."""
    found = re.fullmatch(r"(\d+)\s*([kKmMgG]i?[bB]?|[bB])?", text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a size such as 1073741824, 512MiB or 2GB")
    number, unit = int(found[1]), (found[2] or "").lower().removesuffix("b")
    base = 1024 if unit.endswith("i") else 1000
    return int(number * base ** " kmg".index(unit[:1] or " "))


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _truth(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in ("1", "true")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:  # an empty key must not open the server
        raise ValueError("is empty")
    return names


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: its field, how text becomes its value, and its help."""

    name: str
    kind: Callable[[str], Any]
    metavar: str
    help: str


SERVER = (
    Option("host", str, "ADDRESS", "address to listen on; 0.0.0.0 for every interface"),
    Option("port", _whole, "N", "port to listen on; 0 takes a free one"),
    Option(
        "api_key", _names, "KEY", "key that clients must send (several: separated by commas); better in the environment"
    ),
    Option("served_model_name", _names, "NAME", "name that requests use (several: separated by commas)"),
    Option("max_queued_requests", _whole, "N", "most samples that wait; more are answered with 503"),
    Option("tenant_header", str, "HEADER", "request header that names the tenant; tenants share no cached state"),
    Option(
        "tool_call_parser",
        str,
        "NAME",
        f"format of tool calls: auto (from the chat template), none, {', '.join(tool_parser_names())}",
    ),
    Option("reasoning_parser", str, "NAME", f"format of reasoning: auto, none, {', '.join(reasoning_parser_names())}"),
    Option("per_request_spec_decode_metrics", str, "WHAT", "summary: report speculation statistics with every answer"),
    Option("max_n", _whole, "N", "most samples of one prompt"),
    Option("max_body_bytes", _size, "SIZE", "largest request body"),
    Option("read_timeout", _seconds, "SECONDS", "time a client may take to send its body"),
    Option("write_timeout", _seconds, "SECONDS", "time a client may leave its answer unread"),
    Option("grammar_timeout", _seconds, "SECONDS", "time that compiling a schema, regex or grammar may take"),
    Option("max_grammar_bytes", _size, "SIZE", "longest schema, regex or grammar"),
    Option("log_level", str, "LEVEL", "debug, info, warning or error"),
    Option("log_format", str, "FORMAT", "text or json"),
)
ENGINE = (
    Option("dtype", str, "TYPE", "auto, float32 or bfloat16"),
    Option("activations", str, "TYPE", "of 4- and 8-bit weights on a CPU: auto (8 bits) or float32"),
    Option("device", str, "D", "auto, cpu, cuda or cuda:N"),
    Option("max_model_len", _whole, "N", "longest prompt + output"),
    Option("max_num_seqs", _whole, "N", "most samples that run in one step"),
    Option("max_num_batched_tokens", _whole, "N", "most committed tokens in one step"),
    Option("kv_cache_memory", _size, "SIZE", "memory of the KV cache, such as 2GiB"),
    Option("num_threads", _whole, "N", "CPU threads of the network (default: all cores but one)"),
    Option("rule", str, "NAME", "acceptance rule: coupled, rejection, recursive or multi"),
    Option("tree", str, "NAME", "draft tree: auto, chain, or a shape such as rsd-s:width=4"),
    Option("speculation", str, "SPEC", "none, auto or drafter[:key=value,...][+drafter...][@policy]"),
)
SWITCHES = (
    Option("eager", _truth, "", "capture no CUDA graphs: starts sooner, decodes slower"),
    Option("enable_prefix_caching", _truth, "", "keep the KV of finished requests for later ones that begin alike"),
    Option("trust_remote_code", _truth, "", "run Python code that ships with the checkpoint"),
)
_VLLM = Option("speculative_config", str, "JSON", "speculation in vLLM's form")
_ALL = {option.name: option for option in (*SERVER, *ENGINE, *SWITCHES, _VLLM)}


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model with OpenAI's API",
        description="Serve a model with OpenAI's API, Prometheus metrics and health checks.",
        usage="paceline serve [MODEL] [options]",
        epilog=EPILOG,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder, GGUF file, hub id or built-in name")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    from paceline.server.config import ServerConfig

    for title, group, settings in (("server", SERVER, ServerConfig()), ("engine", ENGINE, EngineConfig())):
        section = parser.add_argument_group(title)
        for option in group:
            default = getattr(settings, option.name)
            shown = "" if default is None or default == () else f" (default: {default})"
            section.add_argument(
                _flag(option), type=_argument(option), metavar=option.metavar, help=option.help + shown
            )
    section.add_argument(_flag(_VLLM), metavar=_VLLM.metavar, help=_VLLM.help)
    for option in SWITCHES:
        default = getattr(EngineConfig(), option.name)
        section.add_argument(
            _flag(option),
            action=argparse.BooleanOptionalAction,
            default=None,
            help=f"{option.help} (default: {'on' if default else 'off'})",
        )
    parser.set_defaults(run=run)


def _flag(option: Option) -> str:
    return "--" + option.name.replace("_", "-")


def _argument(option: Option) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return option.kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    settings = gather(args, os.environ)
    model = settings.pop("model", None)
    if not model:
        raise ConfigError("is missing.", field="MODEL", fix="Write paceline serve MODEL, or set PACELINE_MODEL.")
    try:
        from paceline.server.logs import setup_logging
        from paceline.server.run import bind, serve
        from paceline.server.service import Service
    except ImportError as error:
        raise ConfigError(
            f"the server needs a package that is not installed ({error.name}).",
            fix="Run: python -m pip install 'paceline[serve]'.",
        ) from error
    server, engine = split(settings)
    setup_logging(server.log_level, server.log_format)
    engine.setdefault("num_threads", _threads())
    console = options.stderr_console()
    with bind(server) as listener:
        with options.open_llm(model, engine, console) as llm, options.status(console, "starting the server"):
            service = Service(llm.loaded, llm.engine, server)
        return serve(service, server, listener)


def _threads() -> int:
    """CPU threads of the network by default: one core stays for the event loop.

    PyTorch's threads wait for one another hundreds of times a step; on a core that they share with anything else, each
    wait can cost a time slice.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def gather(args: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    """All settings that were given somewhere: file, then environment, then flags.

    Raises:
        ConfigError: an unreadable file, an unknown key, or a value that cannot be read.
    """
    path = args.config or environment.get("PACELINE_CONFIG")
    settings = read_file(path) if path else {}
    given = {name: getattr(args, name) for name in ("model", *_ALL)}
    from_environment = read_environment(environment)
    flags = {name: value for name, value in given.items() if value is not None}
    for stronger in (from_environment, flags):
        if {"speculation", "speculative_config"} <= set(stronger):
            raise ConfigError("excludes --speculative-config.", field="--speculation", fix="Give one of them.")
        if "speculation" in stronger or "speculative_config" in stronger:
            settings.pop("speculation", None)
            settings.pop("speculative_config", None)
        settings.update(stronger)
    return settings


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Settings from `PACELINE_*` variables; empty ones are ignored.

    Raises:
        ConfigError: a value that cannot be read.
    """
    found: dict[str, Any] = {}
    for name in ("model", *_ALL):
        variable = f"PACELINE_{name.upper()}"
        text = environment.get(variable, "")
        # Kubernetes sets NAME_PORT=tcp://... for every service; one called "paceline" must not break this.
        if not text or (name == "port" and text.startswith("tcp://")):
            continue
        try:
            found[name] = _ALL[name].kind(text) if name in _ALL else text
        except ValueError as error:
            raise ConfigError(f"cannot be read ({error}).", field=variable) from error
    return found


def read_file(path: str) -> dict[str, Any]:
    """Settings from a TOML file.

    Raises:
        ConfigError: it cannot be read, or has a key that no option has.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path} ({error}).", field="--config") from error
    known = {"model", *_ALL}
    unknown = sorted(set(content) - known)
    if unknown:
        raise ConfigError(
            f"{path} has an unknown key {unknown[0]!r}.", field="--config", fix=f"Known: {', '.join(sorted(known))}."
        )
    for name, value in content.items():
        if isinstance(value, str) and name in _ALL:
            try:
                content[name] = _ALL[name].kind(value)
            except ValueError as error:
                raise ConfigError(f"{path}: {name}: {error}.", field="--config") from error
        elif isinstance(value, list):
            content[name] = tuple(value)
    return content


def split(settings: Mapping[str, Any]) -> tuple[ServerConfig, dict[str, Any]]:
    """The server's settings and the engine's options.

    Raises:
        ConfigError: a value is impossible.
    """
    from paceline.plan.spec import from_vllm_json
    from paceline.server.config import ServerConfig

    names = {field.name for field in fields(ServerConfig)}
    server = ServerConfig(**{name: value for name, value in settings.items() if name in names})
    engine = {name: value for name, value in settings.items() if name not in names}
    config = engine.pop("speculative_config", None)
    if config is not None:
        engine["speculation"] = from_vllm_json(config)
    options.check_engine(engine)
    return server, engine
