"""Measured costs kept on disk, one file per model shape, number format, machine and software version."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
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
    longest: int
    """Longest sequence that could be measured, where a model or its KV cache is too short for all shapes."""
    torch: str
    transformers: str
    paceline: str

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: str, gpu: str, longest: int) -> ProfileKey:
        """The key of a model configuration on this machine; `gpu` is empty on a CPU."""
        from paceline import __version__

        shape = {key: value for key, value in config.items() if key not in _NOT_SHAPE}
        text = json.dumps(shape, sort_keys=True, default=str)
        return cls(
            shape=hashlib.sha256(text.encode()).hexdigest()[:16],
            dtype=dtype,
            machine=gpu or _cpu(),
            threads=torch.get_num_threads(),
            longest=longest,
            torch=torch.__version__,
            transformers=transformers.__version__,
            paceline=__version__,
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
        return CostTable.from_json(kept.get("table"), "table")
    except (OSError, ValueError, RecursionError, InputError) as error:
        logger.warning("the cost profile %s cannot be used (%s); measuring again", path, error)
        return None


def save_profile(key: ProfileKey, table: CostTable) -> None:
    """Remember a table; a folder that cannot be written only costs the next start a few seconds."""
    path = key.path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, so that no reader sees half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.write_text(json.dumps({"key": key.describe(), "table": table.to_json()}), encoding="utf-8")
            os.replace(part, path)
    except OSError as error:
        logger.info("the cost profile cannot be kept in %s (%s)", path.parent, error)


def _cpu() -> str:
    """The processor and the cores this process may use. The host's name would not do: containers change it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[1] if found else platform.processor() or platform.machine()}, {cores} cores"
