"""Options that several commands share, and how they become engine and sampling settings.

Defaults are read from the dataclasses of `paceline.config`, never repeated here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config import EngineConfig, SamplingParams
from paceline.draft.registry import DRAFTERS
from paceline.errors import ConfigError, InputError, SamplingParamsError

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.llm import LLM
    from paceline.model.loader import LoadedModel


def _bias(text: str) -> tuple[int, float]:
    token, sep, value = text.partition("=")
    if not sep:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=X")
    return int(token), float(value)


CHARTS = (".png", ".svg", ".pdf")
PLAIN_WIDTH = 120
"""Columns of tables that go to a file or a pipe."""

_SAMPLING: tuple[tuple[str, Callable[[str], Any], str, str], ...] = (
    ("max_tokens", int, "N", "most new tokens"),
    ("min_tokens", int, "N", "no stop before this many new tokens"),
    ("temperature", float, "T", "0 is greedy"),
    ("top_k", int, "K", "sample among the K likeliest tokens; 0 turns it off"),
    ("top_p", float, "P", "sample among the fewest tokens whose probability reaches P"),
    ("min_p", float, "P", "drop tokens less likely than this share of the likeliest"),
    ("presence_penalty", float, "X", "subtracted from the logit of every token already in the output"),
    ("frequency_penalty", float, "X", "subtracted once per occurrence in the output"),
    ("repetition_penalty", float, "X", "divides the logits of tokens in prompt and output"),
    ("seed", int, "N", "same seed, same text; without it fresh entropy is used and reported"),
)
_LISTS: tuple[tuple[str, Callable[[str], Any], str, str], ...] = (
    ("--stop", str, "TEXT", "end before this text; may be repeated"),
    ("--stop-token-id", int, "ID", "end at this token; may be repeated"),
    ("--logit-bias", _bias, "ID=X", "add X to the logit of token ID; may be repeated"),
)
_SAMPLING_NAMES = tuple(name for name, *_ in _SAMPLING)


def add_sampling_options(parser: argparse.ArgumentParser, defaults: Mapping[str, Any] | None = None) -> None:
    """Add the sampling options; `defaults` replaces some defaults of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    values = {f.name: f.default for f in dataclasses.fields(SamplingParams)} | dict(defaults or {})
    for name, kind, metavar, text in _SAMPLING:
        default = values[name]
        shown = "" if default is None else f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=text + shown)
    for flag, kind, metavar, text in _LISTS:
        group.add_argument(flag, action="append", type=kind, default=[], metavar=metavar, help=text)
    group.add_argument("--ignore-eos", action="store_true", help="do not end at the model's end tokens")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling settings of a command line.

    Raises:
        SamplingParamsError: a value is out of range.
    """
    given = vars(args)
    options = {name: given[name] for name in (*_SAMPLING_NAMES, "ignore_eos", "n", "logprobs") if name in given}
    options["stop"] = tuple(given.get("stop", ()))
    options["stop_token_ids"] = tuple(given.get("stop_token_id", ()))
    options["logit_bias"] = dict(given.get("logit_bias", ()))
    options["prediction"] = given.get("prediction")
    return SamplingParams(**options)


def with_overrides(params: SamplingParams, overrides: Mapping[str, Any]) -> SamplingParams:
    """`params` with some fields replaced by those of one line of a prompt file.

    Raises:
        SamplingParamsError: no such field, or a value is out of range.
    """
    known = {f.name for f in dataclasses.fields(SamplingParams)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise SamplingParamsError(f"unknown key {unknown[0]!r}.", fix=f"Known: {', '.join(sorted(known))}.")
    if isinstance(bias := overrides.get("logit_bias"), Mapping):  # JSON has text keys only
        keys = {int(k) if isinstance(k, str) and k.isdecimal() else k: value for k, value in bias.items()}
        overrides = {**overrides, "logit_bias": keys}
    try:
        return dataclasses.replace(params, **overrides)
    except (TypeError, AttributeError) as error:
        raise SamplingParamsError(f"a sampling option has the wrong type ({error}).") from error


def add_engine_options(parser: argparse.ArgumentParser, *, speculation: bool = True) -> None:
    """Add what decides how the engine runs; `speculation=False` leaves that choice to the command."""
    default = EngineConfig()
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default=default.dtype,
        help="number format; auto keeps a GGUF file's 4 and 8 bits on a CPU, and is bfloat16 otherwise where the "
        "hardware has it (default: %(default)s)",
    )
    group.add_argument(
        "--activations",
        choices=("auto", "float32"),
        default=default.activations,
        help="what weights in 4 and 8 bits are multiplied with on a CPU: auto rounds it to 8 bits as llama.cpp does, "
        "float32 does not and is slower (default: %(default)s)",
    )
    group.add_argument(
        "--device",
        default=default.device,
        metavar="D",
        help="auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    group.add_argument("--eager", action="store_true", help="capture no CUDA graphs: starts sooner, decodes slower")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt + output (default: the model's)")
    group.add_argument("--num-threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    group.add_argument(
        "--rule",
        default=default.rule,
        help="rule: coupled, rejection, recursive or multi (default: %(default)s)",
    )
    group.add_argument(
        "--tree",
        default=default.tree,
        help="draft tree: auto, chain, or a shape such as rsd-s:width=4 (default: %(default)s)",
    )
    if speculation:
        choice = group.add_mutually_exclusive_group()
        choice.add_argument(
            "--speculation",
            metavar="SPEC",
            help="none, auto or drafter[:key=value,...][+drafter...][@policy]; "
            f"drafters: {', '.join(DRAFTERS)} (default: {default.speculation})",
        )
        choice.add_argument("--speculative-config", metavar="JSON", help="the same in vLLM's form")


def engine_options(args: argparse.Namespace, speculation: str | None = None) -> dict[str, Any]:
    """Keyword options for `LLM` from a command line.

    Args:
        args: the command line.
        speculation: instead of the command line's. Without speculation the tree is left out: it is for the others.

    Raises:
        ConfigError: an option is impossible; a speculation spec cannot be read.
    """
    given = vars(args)
    names = ("dtype", "activations", "device", "eager", "max_model_len", "num_threads", "rule", "tree")
    options = {name: given[name] for name in names if name in given}
    if speculation is not None:
        options["speculation"] = speculation
        if speculation == "none":
            options.pop("tree", None)
    elif given.get("speculative_config") is not None:
        from paceline.plan.spec import from_vllm_json

        options["speculation"] = from_vllm_json(given["speculative_config"])
    elif given.get("speculation") is not None:
        options["speculation"] = given["speculation"]
    check_engine(options)
    return options


def check_engine(options: Mapping[str, Any]) -> None:
    """Refuse impossible engine options before a model is loaded.

    Raises:
        ConfigError: an option is impossible; a speculation spec cannot be read.
    """
    config = EngineConfig.from_options(options)
    from paceline.engine.speculation import check_speculation

    check_speculation(config)


def open_llm(model: str | LoadedModel, options: Mapping[str, Any], console: Console) -> LLM:
    """Start an engine, saying on `console` what happens meanwhile; a `LoadedModel` shares its weights."""
    if isinstance(model, str) and console.is_terminal:
        from paceline.model.source import resolve_source

        resolve_source(model)  # a first fetch draws its own bars, which a spinner would disturb
    with status(console, "starting") as say:
        from paceline import LLM

        return LLM(model, on_progress=say, **options)


@contextmanager
def status(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a changing text while something slow runs; nothing at all when not on a terminal."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(text) as spinner:
        yield spinner.update


def stderr_console() -> Console:
    """Where progress and notes go, so that stdout holds results only."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """Where results go; colours only on a terminal and without NO_COLOR."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def package_version(name: str) -> str:
    """Version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def add_json_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--json [FILE|-]`."""
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE|-", help=text)


def check_writable(path: str | None, field: str) -> None:
    """Refuse a result file that cannot be written before the work is done rather than after it.

    Raises:
        ConfigError: the folder does not exist or the file is a folder.
    """
    if path is None or path == "-":
        return
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        reason, fix = "lies in a folder that does not exist", f"Make the folder {target.parent} first."
        if target.is_dir():
            reason, fix = "is a folder", "Name a file in it."
        raise ConfigError(f"{path} {reason}.", field=field, fix=fix)


def chart_path(json_path: str | None, plot: str | None) -> str | None:
    """Where the chart goes: `plot`, or beside the JSON file.

    Raises:
        ConfigError: it cannot be written there, is no kind of picture we draw, or is the JSON file itself.
    """
    if plot is None and json_path not in (None, "-"):
        plot = str(Path(str(json_path)).with_suffix(".png"))
        if plot == json_path:
            raise ConfigError(f"{json_path} is where the chart goes.", field="--json", fix="Name the file .json.")
    if plot is not None and Path(plot).suffix.lower() not in CHARTS:
        raise ConfigError(f"{plot} is no picture we can draw.", field="--plot", fix=f"End it in {', '.join(CHARTS)}.")
    check_writable(plot, "--plot")
    return plot


def write_json(value: object, path: str) -> None:
    """Write `value` to a file, or to stdout for `-`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Lists of numbers on one line; a string holds no line break, so none is touched.
    text = re.sub(r"\[\n\s*([-+.eE\d,\s]+?)\n\s*\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def read_jsonl(path: str | Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; empty lines are skipped.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object (the message names it).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand in a string
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({_reason(error)}).", field=field) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} of {path} is not JSON ({error.msg}).", field=field) from error
        if not isinstance(item, dict):
            raise InputError(f"line {number} of {path} is not a JSON object.", field=field)
        yield number, item


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"
