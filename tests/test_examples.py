"""Every file of `examples/` runs as its docstring says and prints something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paceline.errors import PacelineError
from paceline.model.source import resolve_source

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def _model() -> None:
    try:
        resolve_source("smollm2-135m")
    except PacelineError as error:
        pytest.skip(f"the built-in model cannot be had here: {error}")


@pytest.mark.real_model
@pytest.mark.usefixtures("_model")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"offline", "streaming", "with_prediction"}
