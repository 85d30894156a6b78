"""Short runs of the fuzz and of the soak; the long ones are for a release."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_tools import save_tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of `benchmarks/`."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_two_thousand_raw_requests(folder: Path) -> None:
    """No 5xx but 503, no stack trace, nothing left behind."""
    done = run("server_fuzz.py", "--model", str(folder), "--requests", "2000", "--seed", "1")
    assert done.returncode == 0, done.stderr + done.stdout
    assert re.search(r"^5xx other than 503 +0$", done.stdout, re.MULTILINE)
    assert re.search(r"^sent: all +2000$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_fifteen_seconds_at_twice_capacity(folder: Path, tmp_path: Path) -> None:
    """Every accepted request ends, and all blocks come back. Times are judged in the long run on a quiet machine."""
    out = tmp_path / "soak.json"
    limits = ("--health-ms", "2000", "--most-growth-mb", "200")
    done = run("server_soak.py", "--model", str(folder), "--minutes", "0.25", "--json", str(out), *limits)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(out.read_text())
    assert found["completed"] > 20
    assert found["aborted by clients"] > 3
