"""Fixtures that all tests share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))

from paceline.engine.engine import Engine
from paceline.errors import DownloadError
from paceline.model.loader import LoadedModel, load_model
from paceline.model.store import paceline_home

REAL_MODEL = os.environ.get("PACELINE_TEST_MODEL", "smollm2-135m")
"""What tests marked `real_model` load; another source of the same model where no index is reachable."""


# Tiny models gain nothing from threads, and threads that wait on one another lose much on busy cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long suites may take an hour a test on a small machine."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session", autouse=True)
def _own_cost_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests (and processes they start) measure stays out of the user's cache; models are found where they are."""
    home, own = paceline_home(), tmp_path_factory.mktemp("home")
    for name in ("models", "tmp"):
        with contextlib.suppress(OSError):  # a cache that cannot be written may still be read
            (home / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(home / name, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_HOME", str(own))
        yield


@pytest.fixture(autouse=True)
def _no_block_is_lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test, every engine it made accounts for all its blocks."""
    engines: list[Engine] = []
    original = Engine.__init__

    def remember(self: Engine, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", remember)
    yield
    for engine in engines:
        engine.check()


def _load(dtype: str) -> LoadedModel:
    try:
        return load_model(REAL_MODEL, dtype=dtype)
    except DownloadError as error:
        pytest.skip(f"the built-in model cannot be fetched here: {error}")


@pytest.fixture(scope="session")
def real_model() -> LoadedModel:
    """SmolLM2-135M-Instruct in fp32."""
    return _load("float32")


@pytest.fixture(scope="session")
def real_model_bf16() -> LoadedModel:
    """SmolLM2-135M-Instruct in bf16."""
    return _load("bfloat16")


@pytest.fixture(scope="session")
def real_model_kept() -> LoadedModel:
    """SmolLM2-135M-Instruct in its GGUF file's own precision, Q4_1 and Q8_0, or a skip."""
    loaded = _load("auto")
    if not loaded.kept_kinds:
        pytest.skip("Numba is not installed")
    return loaded


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The CUDA device, or a skip."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
