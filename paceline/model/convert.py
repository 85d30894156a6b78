"""Build a sealed checkpoint folder from a GGUF file: what built-in models and local GGUF files share.

Kept apart from `gguf.py` so that finding a model that is already converted does not import the converter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paceline.model import store
from paceline.model.progress import Reporter

CONVERTER_VERSION = 2
"""Raised when the converter's output changes, so that cached conversions are made again."""
BLOCKS_FILE = "gguf-blocks.safetensors"
"""Beside the dequantised weights: those that can run in the GGUF file's precision, as they are in it."""
BLOCKS_FORMAT = "gguf-blocks-1"
"""What the metadata of that file says of itself under `format`."""
KEPT_KINDS = ("Q4_0", "Q4_1", "Q8_0")
"""The GGUF types that can run in their own precision; all others run dequantised."""


def build_checkpoint(gguf: Path, folder: Path, facts: dict[str, Any], reporter: Reporter) -> Path:
    """Convert `gguf` into the new folder `folder` and seal it with `facts` and the converter's version.

    Raises:
        ModelNotFoundError, CorruptFileError, UnsupportedModelError: see `gguf.convert`.
    """
    from paceline.model.gguf import convert

    folder.mkdir()
    stage = None

    def show(done: int, total: int) -> None:
        nonlocal stage
        stage = stage or reporter.stage("convert", total)
        stage.update(done)

    convert(gguf, folder, show)
    store.seal(folder, {**facts, "converter": CONVERTER_VERSION})
    return folder
