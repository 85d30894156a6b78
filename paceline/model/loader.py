"""Load a checkpoint through `transformers`, refusing whatever would not run exactly."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.errors import ConfigError, CorruptFileError, PacelineError, UnsupportedModelError
from paceline.model.checks import check_architecture, check_folder, file_with_code, max_positions
from paceline.model.quantized_loading import can_keep, can_round, load_quantized
from paceline.model.source import resolve_source

__all__ = ["LoadedModel", "check_architecture", "load_model", "resolve_device", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CONSTANTS = ("inv_freq", ".attn.masked_bias")
"""Buffers that older `transformers` saved among the weights: RoPE frequencies, what GPT-2 put for masked scores."""
_BF16_FLAGS = re.compile(r"^flags\s*:.*\b(amx_bf16|avx512_bf16)\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A target or draft model, ready for the runner."""

    name: str
    """What the user called it."""
    path: Path
    """Its checkpoint folder."""
    model: Any
    """The `transformers` model in eval mode, its attention going through Paceline's function."""
    tokenizer: Any
    """The `transformers` tokenizer."""
    config: Any
    """The text model's `transformers` config."""
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text, in ascending order; may be empty."""
    max_model_len: int
    """Longest sequence the model was made for, in tokens."""
    kept_kinds: tuple[str, ...] = ()
    """Types of a GGUF file that matrices are kept in, such as `Q4_1`; empty where all weights are in `dtype`."""
    rounds_inputs: bool = False
    """Whether those are multiplied with inputs rounded to 8 bits."""

    @property
    def precision(self) -> str:
        """Its number formats in a word, for records: `float32`, or `Q4_1+Q8_0 in int8`."""
        dtype = "int8" if self.rounds_inputs else str(self.dtype).removeprefix("torch.")
        return f"{'+'.join(self.kept_kinds)} in {dtype}" if self.kept_kinds else dtype


def load_model(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    activations: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Find, check and load a model.

    Args:
        source: see `resolve_source`.
        dtype: of activations and weights, see `resolve_dtype`. With `auto` on a CPU, matrices of a GGUF file in a type
            that `quantized_loading.py` knows stay in it: that model is the target.
        device: see `resolve_device`.
        activations: what those are multiplied with, see `EngineConfig`.
        trust_remote_code: run modelling or tokenizer code that ships with the checkpoint.

    Raises:
        ConfigError: dtype or device is impossible here.
        ModelNotFoundError, DownloadError: see `resolve_source`.
        UnsupportedModelError: the model cannot be run; the message says why.
        CorruptFileError: a file is damaged, or weights are missing or of another shape than the config says.
    """
    torch_device = resolve_device(device)
    path = resolve_source(source)
    keep = dtype == "auto" and torch_device.type == "cpu" and can_keep(path)
    torch_dtype = torch.float32 if keep else resolve_dtype(dtype, torch_device)
    check_folder(path, trust_remote_code=trust_remote_code)
    trust_remote_code = trust_remote_code and file_with_code(path) is not None
    with quiet():
        config = _read_config(path, trust_remote_code)
        check_architecture(config)
        tokenizer = _read_tokenizer(path, trust_remote_code)
        if keep:
            rounds = activations == "auto" and can_round()
            model, kept_kinds = _keep_weights(path, config, torch_dtype, rounds)
        else:
            model, kept_kinds, rounds = _read_weights(path, config, torch_dtype, trust_remote_code), (), False
    text_config = model.config.get_text_config()
    return LoadedModel(
        name=source,
        path=path,
        model=model.to(torch_device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        config=text_config,
        dtype=torch_dtype,
        device=torch_device,
        eos_token_ids=_eos_token_ids(model, text_config, tokenizer),
        max_model_len=max_positions(text_config),
        kept_kinds=kept_kinds,
        rounds_inputs=rounds,
    )


def resolve_device(device: str) -> torch.device:
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: another word, or a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ConfigError(f"is {device!r}; take auto, cpu, cuda or cuda:N.", field="device")
    found = torch.device(device)
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ConfigError(f"is {device!r}, and {count} CUDA devices are usable here.", field="device")
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or `auto`: bfloat16 where the hardware computes in it, else float32.

    Raises:
        ConfigError: another word.
    """
    if dtype == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    if dtype not in _DTYPES:
        raise ConfigError(f"is {dtype!r}; take auto, float32 or bfloat16.", field="dtype")
    return _DTYPES[dtype]


def dequantised(dtype: str, device: str) -> str:
    """What to load instead of `auto` where weights are trained or taken apart: a type that has gradients."""
    return str(resolve_dtype(dtype, resolve_device(device))).removeprefix("torch.")


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    try:
        return _BF16_FLAGS.search(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")) is not None
    except OSError:  # not Linux
        return False


def _read_config(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes validate with many exception types
        raise _unreadable(path / "config.json", error) from error


def _read_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizer library raises plain `Exception` for a damaged file
        raise _unreadable(path / "tokenizer.json", error) from error


def _keep_weights(path: Path, config: Any, dtype: torch.dtype, rounds: bool) -> tuple[Any, tuple[str, ...]]:
    try:
        return load_quantized(path, config, dtype, rounds_inputs=rounds)
    except PacelineError:
        raise
    except Exception as error:  # a config that no model can be built from, a weights file that is none
        raise _unreadable(path, error) from error


def _read_weights(path: Path, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    from paceline.model import attention as _attention  # noqa: F401  # registers "paceline"

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="paceline",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except PacelineError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    _check_loading(path, model, info)
    return model


def _check_loading(path: Path, model: Any, info: dict[str, Any]) -> None:
    """`transformers` fills missing weights with noise and drops unknown ones, and merely warns."""
    for key, what in (
        ("missing_keys", "weights are missing"),
        ("mismatched_keys", "weights have another shape"),
    ):
        if info.get(key):
            raise CorruptFileError(f"{what}: {_first(info[key])}.", field=str(path), fix="Fetch the model again.")
    if info.get("error_msgs"):
        raise CorruptFileError(f"weights could not be read: {_first(info['error_msgs'])}.", field=str(path))
    modules = {name for name, _ in model.named_modules()}
    stray = [key for key in info.get("unexpected_keys", ()) if _is_stray(key, modules, model.base_model_prefix)]
    if stray:
        raise UnsupportedModelError(f"has weights that its layers do not use: {_first(stray)}.", field=str(path))


def _is_stray(key: str, modules: set[str], prefix: str) -> bool:
    """A head of another task is rightly dropped; a stray bias or scale of a layer we run is not."""
    if key.endswith(_CONSTANTS):
        return False
    owner = key.rpartition(".")[0]
    if ".experts." in key:  # all experts of a layer are one module, whatever the checkpoint calls each
        owner = key.partition(".experts.")[0] + ".experts"
    # Some checkpoints hold the body alone, without the name that the whole model gives it.
    return bool(owner) and (owner in modules or f"{prefix}.{owner}" in modules)


def _eos_token_ids(model: Any, config: Any, tokenizer: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    declared = getattr(generation, "eos_token_id", None)
    if declared is None:
        declared = getattr(config, "eos_token_id", None)
    ids = set(declared) if isinstance(declared, list | tuple) else {declared}
    return tuple(sorted(int(token) for token in ids | {tokenizer.eos_token_id} if token is not None))


def _unreadable(path: Path, error: Exception) -> CorruptFileError:
    lines = str(error).strip().splitlines()
    # The report that some messages point to is not printed here.
    reason = lines[0].partition(" For details look at")[0][:300] if lines else type(error).__name__
    return CorruptFileError(f"cannot be loaded ({reason}).", field=str(path))


def _first(items: Any) -> str:
    names = sorted(str(item[0]) if isinstance(item, tuple) else str(item) for item in items)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings or bars from `transformers`: what matters in them is raised as an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
