"""Write the tensors of a GGUF file as safetensors: dequantised, and those that can be kept also as they are.

Both files are written tensor by tensor, so that memory holds one tensor and not the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.model.convert import BLOCKS_FORMAT, KEPT_KINDS
from paceline.model.gguf_reader import GgufFile

_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}  # safetensors name, bytes


@dataclass(frozen=True, slots=True)
class Rule:
    """Where one tensor of the checkpoint comes from."""

    source: str
    target: str
    shape: tuple[int, ...]
    heads: int = 0
    """Number of heads whose rows llama.cpp interleaved for its rotary embedding; 0 if rows are in order."""


def write_weights(
    file: GgufFile, rules: list[Rule], dtype: str, path: Path, on_progress: Callable[[int, int], None] | None
) -> None:
    """Write all tensors, dequantised.

    Args:
        file: where they come from.
        rules: which, and in what order.
        dtype: `float32`, `float16` or `bfloat16`; it must hold all values exactly.
        path: the file to write.
        on_progress: called with bytes written and bytes in all after each tensor.

    Raises:
        CorruptFileError, UnsupportedModelError: see `GgufFile.dequantise`.
    """
    code, width = _DTYPES[dtype]
    entries = [(rule.target, code, list(rule.shape), width * file.tensors[rule.source].numel) for rule in rules]
    contents = (_encode(_in_order(file.dequantise(rule.source), rule.heads), dtype) for rule in rules)
    _write(path, entries, contents, {"format": "pt"}, on_progress)


def write_blocks(file: GgufFile, rules: list[Rule], path: Path) -> None:
    """Write the matrices of a kind that can be kept, as the rows of bytes that they are; no file if there are none.

    The file's metadata names the kind of each.  # uint8 [rows, bytes of a row]
    """
    kept = [r for r in rules if len(r.shape) == 2 and file.tensors[r.source].kind.name in KEPT_KINDS]
    if not kept:
        return
    sizes = [file.tensors[rule.source].nbytes for rule in kept]
    entries = [
        (rule.target, "U8", [rule.shape[0], size // rule.shape[0]], size)
        for rule, size in zip(kept, sizes, strict=True)
    ]
    contents = (_in_order(file.stored(rule.source), rule.heads).tobytes() for rule in kept)
    kinds = {rule.target: file.tensors[rule.source].kind.name for rule in kept}
    _write(path, entries, contents, {"format": BLOCKS_FORMAT, **kinds}, None)


def _write(
    path: Path,
    entries: list[tuple[str, str, list[int], int]],
    contents: Iterable[bytes],
    metadata: dict[str, str],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Write a safetensors file of tensors described by name, type, shape and size in bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    total = 0
    for name, code, shape, size in entries:
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [total, total + size]}
        total += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for content in contents:
            done += out.write(content)
            if on_progress is not None:
                on_progress(done, total)
        out.flush()
        os.fsync(out.fileno())  # the rename that publishes the folder must not overtake its contents


def _in_order(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's pairing: `[head][dim/2][2] -> [head][2][dim/2]` along the rows."""
    if not heads:
        return rows
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _encode(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "float16":
        return values.astype("<f2").tobytes()
    if dtype == "bfloat16":  # exact here, so the upper half is the whole value
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f4", copy=False).tobytes()
