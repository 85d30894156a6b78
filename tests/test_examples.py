"""Every file of `examples/` runs as its docstring says and prints something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from paceline.errors import PacelineError
from paceline.model.source import resolve_source

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SERVED = [path for path in EXAMPLES if "paceline serve" in path.read_text()]


@pytest.fixture(scope="module")
def _model() -> None:
    try:
        resolve_source("smollm2-135m")
    except PacelineError as error:
        pytest.skip(f"the built-in model cannot be had here: {error}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `paceline serve smollm2-135m`."""
    if not all(find_spec(name) for name in ("fastapi", "openai", "xgrammar")):
        pytest.skip("the server or OpenAI's client is not installed")
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "paceline", "serve", "smollm2-135m", "--port", "0", "--kv-cache-memory", "256MiB"]
    with log.open("w") as file, subprocess.Popen(command, stderr=file) as process:
        while not (address := re.search(r"http://\S+/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield address[0]
        process.terminate()


@pytest.mark.real_model
@pytest.mark.usefixtures("_model")
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path not in SERVED], ids=lambda path: path.stem)
def test_example_runs(path: Path) -> None:
    run(path)


@pytest.mark.slow  # a second copy of the model; `tests/server` has the same requests to a tiny one
@pytest.mark.real_model
@pytest.mark.usefixtures("_model")
@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.stem)
def test_example_with_a_server_runs(path: Path, server: str) -> None:
    run(path, OPENAI_BASE_URL=server)


def run(path: Path, **environment: str) -> None:
    """Run an example."""
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_examples() -> None:
    names = {"offline", "streaming", "with_prediction", "openai_client", "structured"}
    assert {path.stem for path in EXAMPLES} >= names
