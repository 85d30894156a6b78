"""Checkpoints of a training run: two files each, the last two are kept.

`step-000500.safetensors` holds the tensors and `step-000500.json` the facts, with the SHA-256 of the former. Both are
written under another name and renamed, the facts last: a checkpoint without facts was interrupted and does not count.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from paceline.errors import CorruptFileError
from paceline.model.draft_weights import file_facts

_KEEP = 2


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Path:
    """Write a checkpoint and drop those before the last two; returns the file of facts."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights, about = _paths(folder, step)
    part = weights.with_suffix(".part")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part)
    digest = file_facts(part)
    about.unlink(missing_ok=True)  # from here until the facts are written there is no checkpoint of this step
    os.replace(part, weights)
    part = about.with_suffix(".json.part")
    part.write_text(json.dumps({"weights": digest, **facts}), encoding="utf-8")
    os.replace(part, about)
    for old in _steps(folder)[:-_KEEP]:
        for path in reversed(_paths(folder, old)):
            path.unlink(missing_ok=True)
    return about


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint, or None where there is none.

    Raises:
        CorruptFileError: it is damaged; names the file and says what is left to go on from.
    """
    from safetensors.torch import load_file

    steps = _steps(folder)
    if not steps:
        return None
    weights, about = _paths(folder, steps[-1])
    try:
        facts = json.loads(about.read_text(encoding="utf-8"))
        expected = facts["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _corrupt(about, steps) from error
    if not weights.is_file() or file_facts(weights) != expected:
        raise _corrupt(weights, steps)
    return load_file(weights), facts


def has_checkpoint(folder: Path) -> bool:
    """Whether there is anything to go on from, damaged or not."""
    return bool(_steps(folder))


def remove_checkpoints(folder: Path) -> None:
    """Forget the training so far."""
    for path in (*folder.glob("step-*.json"), *folder.glob("step-*.safetensors"), *folder.glob("step-*.part")):
        path.unlink()


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.json"))


def _paths(folder: Path, step: int) -> tuple[Path, Path]:
    return folder / f"step-{step:06d}.safetensors", folder / f"step-{step:06d}.json"


def _corrupt(path: Path, steps: list[int]) -> CorruptFileError:
    before = f"go on from step {steps[-2]}" if len(steps) > 1 else "begin the training again"
    return CorruptFileError(
        "is a damaged checkpoint.",
        field=str(path),
        fix=f"Delete {path.with_suffix('')}.* and run the same command to {before}; "
        "--restart forgets all checkpoints. The training text is kept either way.",
    )
