"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def host_info(precision: str, device: torch.device) -> dict[str, Any]:
    """The machine, the software and the command line, for the record; `precision` as `LoadedModel.precision`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{_cpu_model()}, {cores} cores"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "dtype": precision,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("paceline", "torch", "transformers")},
        "command": shlex.join(map(_told, sys.argv)).replace("__main__.py", "paceline", 1),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _told(argument: str) -> str:
    """An argument as others may read it: of a path on this machine, the name."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
