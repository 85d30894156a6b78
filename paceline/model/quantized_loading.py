"""Build a `transformers` model whose matrices stay in the blocks of the GGUF file that they came from.

They run as they are (`TiledLinear`): same levels, scales and minimums; inputs are rounded to 8 bits, or not.

Peak memory is the model plus one matrix: both files are mapped, and the dequantised one is read only for what has no
blocks (norms, biases, matrices of other types).
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from paceline.errors import CorruptFileError, UnsupportedModelError
from paceline.model.convert import BLOCKS_FILE, BLOCKS_FORMAT, KEPT_KINDS
from paceline.model.gguf_blocks import BLOCK, BLOCK_BYTES, take_apart
from paceline.model.quantized_embedding import QuantizedEmbedding
from paceline.model.tiled_linear import tile_blocks

logger = logging.getLogger(__name__)
_WEIGHTS = "model.safetensors"
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head"


def can_keep(folder: Path) -> bool:
    """Whether a checkpoint folder has matrices in a GGUF file's blocks and there is what multiplies with them."""
    if not (folder / BLOCKS_FILE).is_file():
        return False
    if find_spec("numba") is not None:
        return True
    logger.warning("Numba is not installed: 4-bit and 8-bit weights of %s are dequantised", folder.name)
    return False


def can_round() -> bool:
    """Whether this CPU multiplies inputs of 8 bits; a line says if it does not."""
    from paceline.model.native.integer_kernel import integer_instructions

    if integer_instructions():
        return True
    logger.warning("this CPU has neither AVX2 nor VNNI: activations stay in float32, which is slower")
    return False


def load_quantized(
    folder: Path, config: Any, dtype: torch.dtype, *, rounds_inputs: bool = False
) -> tuple[Any, tuple[str, ...]]:
    """Load a folder that `can_keep` said yes to.

    Args:
        folder: the checkpoint.
        config: its `transformers` config.
        dtype: of activations, and of all weights that are not kept.
        rounds_inputs: whether the inputs of kept matrices are rounded to 8 bits.

    Returns:
        The `transformers` model on the CPU, and the GGUF types that were kept, in alphabetical order.

    Raises:
        CorruptFileError: the blocks cannot be read, or do not fit the rest of the checkpoint.
        UnsupportedModelError: the checkpoint has weights that the model does not use.
    """
    path = folder / BLOCKS_FILE
    model = _skeleton(folder, config, dtype)
    kinds = _kinds(model, path)
    rest = _rest(folder / _WEIGHTS, kinds, dtype)
    if _EMBEDDING in kinds:
        model.set_input_embeddings(QuantizedEmbedding(_stored(path, _EMBEDDING), kinds[_EMBEDDING], dtype))
    for name in _matrices(model, kinds):
        place = _HEAD if name == _EMBEDDING else name.removesuffix(".weight")
        bias = _bias(model.get_submodule(place), f"{place}.bias", rest, folder / _WEIGHTS)
        blocks = take_apart(_stored(path, name), kinds[name])
        model.set_submodule(place, tile_blocks(blocks, bias, dtype, rounds_inputs=rounds_inputs))
    _fill(model, rest, folder / _WEIGHTS)
    return model, tuple(sorted(set(kinds.values())))


def _skeleton(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model without weights; of the architectures that GGUF files have, RoPE alone computes something itself."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from paceline.model import attention as _attention  # noqa: F401  # registers "paceline"

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="paceline")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _kinds(model: Any, path: Path) -> dict[str, str]:
    """The kind of every kept matrix by its name, all checked to be matrices of the model in their shape."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            kinds = dict(file.metadata() or {})
            slices = [(name, file.get_slice(name)) for name in tuple(file.keys())]
            shapes = {name: (part.get_dtype(), part.get_shape()) for name, part in slices}
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"cannot be read ({error}).", field=str(path)) from error
    if kinds.pop("format", None) != BLOCKS_FORMAT or kinds.keys() != shapes.keys():
        raise CorruptFileError("does not say what its tensors are.", field=str(path))
    parameters = dict(model.named_parameters())
    for name, kind in kinds.items():
        parameter = parameters.get(name)
        if kind not in KEPT_KINDS or parameter is None or parameter.dim() != 2:
            raise CorruptFileError(f"has the tensor {name!r} of kind {kind!r}.", field=str(path))
        rows, width = parameter.shape
        if width % BLOCK or shapes[name] != ("U8", [rows, width // BLOCK * BLOCK_BYTES[kind]]):
            raise CorruptFileError(f"tensor {name!r} does not fit the model.", field=str(path))
    return kinds


def _rest(path: Path, kinds: dict[str, str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights that are not kept in blocks."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name).to(dtype, copy=True) for name in names if name not in kinds}


def _stored(path: Path, name: str) -> torch.Tensor:
    """The stored rows of a matrix: mapped, and unmapped with the tensor, for which the file is opened each time.

    uint8 [N, B]
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        rows: torch.Tensor = file.get_tensor(name)
        return rows


def _matrices(model: Any, kinds: dict[str, str]) -> list[str]:
    """Names of the kept matrices that tokens are multiplied with; a tied embedding is one of them."""
    return [name for name in kinds if name != _EMBEDDING or model.config.tie_word_embeddings]


def _bias(linear: Any, name: str, rest: dict[str, torch.Tensor], path: Path) -> torch.Tensor | None:
    """The bias of a layer that has one, taken out of `rest`."""
    if linear.bias is None:
        return None
    bias = rest.pop(name, None)
    if bias is None or bias.shape != linear.bias.shape:
        raise CorruptFileError(f"lacks the tensor {name!r}, or has another shape of it.", field=str(path))
    return bias


def _fill(model: Any, rest: dict[str, torch.Tensor], path: Path) -> None:
    """Put the other weights in their places: each must have one, and every place must be filled then."""
    try:
        stray = model.load_state_dict(rest, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise CorruptFileError("has a weight of another shape than the model's.", field=str(path)) from error
    if stray:
        raise UnsupportedModelError(f"has weights that its layers do not use: {stray[0]}.", field=str(path))
    if _EMBEDDING in rest:  # a kept one has given the head its own layer
        model.tie_weights()
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise CorruptFileError(f"lacks the tensor {empty[0]!r}.", field=str(path))
