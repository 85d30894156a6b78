"""Build a sealed checkpoint folder from a GGUF file: what built-in models and local GGUF files share.

Kept apart from `gguf.py` so that finding a model that is already converted does not import the converter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paceline.model import store
from paceline.model.progress import Reporter

CONVERTER_VERSION = 1
"""Raised when the converter's output changes, so that cached conversions are made again."""


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
