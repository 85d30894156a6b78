"""Rebuild a Hugging Face `config.json` from GGUF metadata.

Supported are the architectures whose weights map one to one and whose tokenizers can be rebuilt: llama,
qwen2, qwen3. Whatever in the file asks for a computation outside of these (experts, partial rotary
embeddings, unknown RoPE scaling) is refused by name instead of being dropped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.errors import CorruptFileError, UnsupportedModelError
from paceline.model.gguf_reader import scalar

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_AS_SAFETENSORS = ("gemma2", "gemma3", "gpt2", "granite", "olmo2", "phi3", "qwen2moe", "qwen3moe")
"""What GGUF calls the architectures that run from a safetensors checkpoint; it has none for OPT."""
_FIX = "Text models of this family run from their safetensors checkpoints."
_MAX_INT = 1 << 31


def build_config(
    metadata: dict[str, Any],
    vocab_size: int,
    tied: bool,
    rope_freqs: npt.NDArray[np.float32] | None,
    file: Path,
) -> dict[str, Any]:
    """The config as a dict, without token ids and dtype.

    Args:
        metadata: the GGUF file's metadata.
        vocab_size: rows of the embedding.
        tied: whether the head is the embedding.
        rope_freqs: `[head_dim / 2]`, the divisors of the RoPE frequencies in Llama 3.1 files, or None.
        file: the GGUF file, for error messages.

    Raises:
        UnsupportedModelError: another architecture, or a feature that is not supported.
        CorruptFileError: a needed value is missing or impossible.
    """
    read = _Metadata(metadata, file)
    hidden, heads = read.count("embedding_length"), read.count("attention.head_count")
    kv_heads = read.count("attention.head_count_kv", heads)
    head_dim = read.count("attention.key_length", hidden // heads)
    context = read.count("context_length")
    read.check(heads % kv_heads == 0, f"{heads} attention heads cannot share {kv_heads} KV heads")
    read.check(head_dim % 2 == 0 and head_dim > 0, f"its head size is {head_dim}")
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.count(key, head_dim) != head_dim:
            raise read.unsupported(f"{read.arch}.{key} differs from the head size {head_dim}")
    return {
        "architectures": [ARCHITECTURES[read.arch]],
        "model_type": read.arch,
        "hidden_size": hidden,
        "intermediate_size": read.count("feed_forward_length"),
        "num_hidden_layers": read.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": read.positive("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(read, head_dim, context, rope_freqs),
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
    }


class _Metadata:
    """Typed access to one file's metadata under its architecture's prefix."""

    def __init__(self, metadata: dict[str, Any], file: Path) -> None:
        self._metadata = metadata
        self._file = file
        kind = scalar(metadata, "general.type", "model", file)
        if kind != "model":
            raise self.unsupported(f"it is of type {kind!r}, not a whole model")
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str):
            self.check(False, "general.architecture is missing")
        if arch not in ARCHITECTURES:
            why = f"its architecture is {arch!r}, and GGUF files are read for {', '.join(ARCHITECTURES)} only"
            raise self.unsupported(why, fix=_FIX if arch in _AS_SAFETENSORS else None)
        self.arch: str = arch
        if scalar(metadata, "split.count", 1, file) not in (0, 1):
            raise self.unsupported("it is one part of a split file; merge the parts first")
        if self.get("expert_count", 0) != 0:
            raise self.unsupported("it is a mixture of experts")
        if self.get("attention.sliding_window", 0) != 0:
            raise self.unsupported("it uses sliding-window attention, which is not read from GGUF files")

    def get(self, key: str, default: Any = None) -> Any:
        return scalar(self._metadata, f"{self.arch}.{key}", default, self._file)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(key, default)
        self.check(
            type(value) is int and 1 <= value < _MAX_INT,
            f"{self.arch}.{key} is {_short(value)}, not a positive number",
        )
        return int(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        good = isinstance(value, int | float) and math.isfinite(value) and value > 0
        self.check(good, f"{self.arch}.{key} is {_short(value)}, not a positive number")
        return float(value)

    def check(self, good: bool, what: str) -> None:
        if not good:
            raise CorruptFileError(f"is not a valid GGUF model: {what}.", field=str(self._file))

    def unsupported(self, what: str, fix: str | None = None) -> UnsupportedModelError:
        return UnsupportedModelError(f"cannot be run: {what}.", field=str(self._file), fix=fix)


def _rope(read: _Metadata, head_dim: int, context: int, freqs: npt.NDArray[np.float32] | None) -> dict[str, Any]:
    theta = read.positive("rope.freq_base", 10000.0)
    scaling = read.get("rope.scaling.type", "none")
    if freqs is not None:
        if scaling != "none":
            raise read.unsupported("it has both RoPE factors and RoPE scaling")
        return _llama3_rope(read, theta, head_dim, freqs)
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = read.positive("rope.scaling.factor")
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if scaling == "yarn":
        original = read.count("rope.scaling.original_context_length", max(1, int(min(context / factor, _MAX_INT))))
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise read.unsupported(f"RoPE scaling {_short(scaling)}")


def _llama3_rope(read: _Metadata, theta: float, head_dim: int, freqs: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Find the Llama 3.1 parameters that give the file's divisors: the file holds only the result."""
    for factor in (8.0, 32.0):
        low, high, original = 1.0, 4.0, 8192
        waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
        if freqs.shape == waves.shape and np.allclose(freqs, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise read.unsupported("its RoPE factors are not those of a known Llama 3 model")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
