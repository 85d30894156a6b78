"""What Paceline can run, and one sentence for each thing it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paceline.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError
from paceline.model.store import check_safetensors

PROVED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "opt",
    "olmo2",
    "granite",
    "qwen2_moe",
    "qwen3_moe",
)
"""Architectures whose output is tested to equal `transformers`' own, token for token."""

_TAKEN_OVER = {"phi3": {"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM", "Xenova/gpt-4o"}}
"""Code named by published checkpoints that `transformers` has taken over: its own is used, theirs is never run."""
_MULTIMODAL = ("vision_config", "audio_config", "image_token_id", "image_token_index", "audio_token_id")


def check_folder(path: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse, before any library opens it, a checkpoint folder that must not or cannot be loaded.

    Raises:
        ModelNotFoundError: there is no config.json, or no weights.
        UnsupportedModelError: an adapter, pickled weights, or code of its own without `trust_remote_code`.
        CorruptFileError: a JSON or safetensors file is damaged or missing; names it.
    """
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        kind = read_json(adapter).get("peft_type", "PEFT")
        raise UnsupportedModelError(
            f"is a {kind} adapter, not a whole model; adapters cannot be run yet.",
            field=str(path),
            fix="Merge it into its base model first.",
        )
    if not (path / "config.json").is_file():
        raise ModelNotFoundError("has no config.json.", field=str(path))
    file = file_with_code(path)
    if file is not None and not trust_remote_code:
        raise UnsupportedModelError(
            "asks to run Python code that ships with the checkpoint.",
            field=str(file),
            fix="Read that code, then pass trust_remote_code if you trust it.",
        )
    _check_weights(path)


def file_with_code(path: Path) -> Path | None:
    """The file of a checkpoint folder that asks to run Python code of its own, if there is one.

    Raises:
        CorruptFileError: the file is not readable JSON.
    """
    for name in ("config.json", "tokenizer_config.json"):
        content = read_json(path / name) if (path / name).is_file() else {}
        code = content.get("auto_map")
        if not code:
            continue
        names = set(code.values()) if isinstance(code, dict) else {code}
        # A fine-tuned copy names the repository, too: "owner/name--modeling_phi3.Phi3ForCausalLM".
        taken_over = _TAKEN_OVER.get(str(content.get("model_type")), set())
        if not all(isinstance(name, str) and name.rpartition("--")[2] in taken_over for name in names):
            return path / name
    return None


def check_architecture(config: Any) -> None:
    """Refuse a `transformers` config that Paceline cannot run.

    Raises:
        UnsupportedModelError: one sentence that says why.
    """
    kind = str(getattr(config, "model_type", None) or "unknown")
    method = _quantisation(config)
    if method is not None:
        raise _refuse(kind, f"is quantised with {method}, which cannot be run yet; take the unquantised checkpoint.")
    if getattr(config, "is_encoder_decoder", False):
        raise _refuse(kind, "is an encoder-decoder model; only decoder-only causal language models can be run.")
    if any(getattr(config, name, None) is not None for name in _MULTIMODAL):
        raise _refuse(kind, "is a multimodal model; only text models can be run.")
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        raise _refuse(kind, "lets tokens attend to later ones; only causal language models can be run.")
    if getattr(config, "add_cross_attention", False):
        raise _refuse(kind, "has cross-attention to another model's output; only models of text alone can be run.")
    if kind not in PROVED:
        raise _refuse(kind, f"is not among the architectures proved so far: {', '.join(PROVED)}.")
    classes = getattr(config, "architectures", None) or []
    if classes and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        raise _refuse(kind, f"is a {classes[0]}, which is not a causal language model.")
    if "dynamic" in _rope_types(config):
        raise _refuse(kind, "uses dynamic RoPE scaling, whose results depend on the longest sequence in the batch.")
    max_positions(config)


def max_positions(config: Any) -> int:
    """The longest sequence in tokens; the original length for longrope, which changes its angles beyond it.

    Raises:
        UnsupportedModelError: the config does not say.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if "longrope" in _rope_types(config):
        limit = getattr(config, "original_max_position_embeddings", None) or next(
            (rope.get("original_max_position_embeddings") for rope in _ropes(config)), None
        )
    if not isinstance(limit, int) or limit < 1:
        raise _refuse(str(config.model_type), "does not state its maximum length in config.json.")
    return limit


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptFileError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError("is not readable JSON.", field=str(path)) from error
    if not isinstance(content, dict):
        raise CorruptFileError("does not hold a JSON object.", field=str(path))
    return content


def _check_weights(path: Path) -> None:
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")) + sorted(path.glob("*.pth"))
        if pickled:
            raise UnsupportedModelError(
                f"has only pickled weights ({pickled[0].name}), which can run code when loaded.",
                field=str(path),
                fix="Convert them to safetensors.",
            )
        raise ModelNotFoundError("has no *.safetensors weights.", field=str(path))
    for shard in shards:
        check_safetensors(shard)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        placed = read_json(index).get("weight_map")
        wanted = {str(name) for name in placed.values()} if isinstance(placed, dict) else set()
        missing = sorted(wanted - {shard.name for shard in shards})
        if missing:
            raise CorruptFileError("is missing.", field=str(path / missing[0]), fix="Fetch the model again.")


def _quantisation(config: Any) -> str | None:
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return None
    if not isinstance(quantised, dict):
        quantised = getattr(quantised, "__dict__", {})
    method = quantised.get("quant_method")
    return str(getattr(method, "value", method) or "an unnamed method")


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The RoPE settings: one for the model, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _rope_types(config: Any) -> set[str]:
    return {str(rope.get("rope_type", rope.get("type"))) for rope in _ropes(config)}


def _refuse(kind: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(why, field=f"model of type {kind}")
