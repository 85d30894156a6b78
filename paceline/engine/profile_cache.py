"""Measured costs kept on disk, one file per model shape, number format, machine and software version."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from paceline.errors import InputError
from paceline.model.store import paceline_home
from paceline.plan.cost_model import CostTable

logger = logging.getLogger(__name__)
_NOT_SHAPE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What measured costs depend on."""

    shape: str
    """Digest of the model's configuration."""
    dtype: str
    machine: str
    threads: int
    torch: str
    transformers: str
    paceline: str

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: str, gpu: str) -> ProfileKey:
        """The key of a model configuration on this machine; `gpu` is empty on a CPU."""
        from paceline import __version__

        shape = {key: value for key, value in config.items() if key not in _NOT_SHAPE}
        text = json.dumps(shape, sort_keys=True, default=str)
        machine = gpu or f"{platform.node()} {platform.machine()} {os.cpu_count()} cores"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cls(
            digest, dtype, machine, torch.get_num_threads(), torch.__version__, transformers.__version__, __version__
        )

    def describe(self) -> dict[str, Any]:
        """The key's parts by name."""
        return asdict(self)

    def path(self) -> Path:
        """Its file."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:24]
        return paceline_home() / "profiles" / f"{digest}.json"


def load_profile(key: ProfileKey) -> CostTable | None:
    """What is remembered; None (with a warning) if the file is damaged or belongs to something else."""
    path = key.path()
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or kept.get("key") != key.describe():
            raise InputError("belongs to another model or machine.", field="key")
        return CostTable.from_json(kept.get("table"))
    except (OSError, ValueError, InputError) as error:
        logger.warning("the cost profile %s cannot be used (%s); measuring again", path, error)
        return None


def save_profile(key: ProfileKey, table: CostTable) -> None:
    """Remember a table; a folder that cannot be written only costs the next start a few seconds."""
    path = key.path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump({"key": key.describe(), "table": table.to_json()}, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("the cost profile cannot be kept in %s (%s)", path.parent, error)
