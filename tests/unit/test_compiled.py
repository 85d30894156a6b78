"""Where compiled code is kept: never where that of other sources is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

import paceline
from paceline import compiled

ROOT = Path(paceline.__file__).parent


@pytest.mark.parametrize(
    "name", ["model/native/tiles.py", "draft/suffixes/nodes.py", "engine/race.py", "model/kernels/layout.py"]
)
def test_any_change_of_what_is_compiled_changes_the_folder(tmp_path: Path, name: str) -> None:
    for folder in ("model/native", "model/kernels", "draft/suffixes", "engine"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "compiled.py", tmp_path)
    before = compiled.digest(tmp_path)
    assert before == compiled.digest()
    file = tmp_path / name
    file.write_text(file.read_text() + "\n# another\n")
    assert compiled.digest(tmp_path) != before


def test_every_file_that_compiles_counts() -> None:
    """A file that uses Numba must be among those of the digest."""
    counted = {path for pattern in compiled._COMPILED for path in ROOT.glob(pattern)}
    uses = {path for path in ROOT.rglob("*.py") if re.search(r"^(from|import) numba", path.read_text(), re.MULTILINE)}
    assert len(uses) > 10
    assert uses <= counted


def test_code_is_kept_there_and_numbas_own_setting_stays() -> None:
    from paceline.engine import race

    folder = compiled._folder()
    assert folder is not None
    assert folder.name.endswith(compiled.digest())
    assert Path(race._race._cache.cache_path).is_relative_to(folder)
    assert str(folder) != numba.config.CACHE_DIR


def test_without_a_place_to_write_it_compiles_every_time() -> None:
    code = (
        "from pathlib import Path\n"
        "def refuse(*_, **__): raise PermissionError\n"
        "Path.mkdir = refuse\n"
        "from paceline.compiled import compiled\n"
        "double = compiled()(lambda x: 2 * x)\n"
        "assert double(4) == 8\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
