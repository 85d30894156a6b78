"""The smaller draft of the real model, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.bench.systems.drafts import save_dropped
from paceline.model.loader import LoadedModel


@pytest.fixture(scope="session")
def dropped(real_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every second layer of the built-in model."""
    return save_dropped(real_model, tmp_path_factory.mktemp("dropped"))
