"""From a name to a checkpoint folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files as tiny
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from paceline.errors import CorruptFileError, DownloadError, ModelNotFoundError, UnsupportedModelError
from paceline.model import source
from paceline.model.source import resolve_source


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "my model.gguf"
    tiny.write_gguf(path, "llama", tiny.make_model("llama"))
    return path


def use_hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return answer(**options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_builtin_names_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "fetch_builtin", lambda name, force: Path("/built-in") / name / str(force))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin").mkdir()
    assert resolve_source("builtin") == Path("/built-in/builtin/False")
    assert resolve_source("smollm2-135m", force=True) == Path("/built-in/smollm2-135m/True")
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        resolve_source("./builtin")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_source(str(tmp_path)) == tmp_path


def test_folder_with_only_a_gguf_file_says_so(gguf: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"my model\.gguf"):
        resolve_source(str(gguf.parent))


def test_gguf_is_converted_once(home: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_source(str(gguf))
    assert folder.is_relative_to(home)
    assert (folder / "model.safetensors").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(source, "build_checkpoint", None)
        assert resolve_source(str(gguf)) == folder
        patch.chdir(gguf.parent)
        assert resolve_source(gguf.name) == folder
    os.utime(gguf, (1, 1))
    assert resolve_source(str(gguf)) != folder
    assert not list(home.glob("tmp/*"))


def test_damaged_conversion_is_made_again(gguf: Path) -> None:
    folder = resolve_source(str(gguf))
    for name in ("model.safetensors", "paceline.json"):
        (folder / name).write_bytes(b"")
        assert resolve_source(str(gguf)) == folder
        assert (folder / name).stat().st_size > 0


def test_damaged_gguf_leaves_nothing(home: Path, gguf: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:5000])
    with pytest.raises(CorruptFileError, match=r"my model\.gguf"):
        resolve_source(str(gguf))
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"abc")
    with pytest.raises(UnsupportedModelError, match="not a GGUF"):
        resolve_source(str(path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="Give the folder"):
        resolve_source(str(path))
    (tmp_path / "foreign.gguf").write_bytes(b"abc")
    with pytest.raises(CorruptFileError, match=r"foreign\.gguf"):
        resolve_source(str(tmp_path / "foreign.gguf"))


@pytest.mark.parametrize("name", ["nonsense", "/no/such", "./x", "~/x.gguf", "", "  ", "a\0b", "x" * 5000, "a/b/c"])
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ModelNotFoundError, match=r"smollm2-135m.*\.gguf.*org/name"):
        resolve_source(name)


def test_typing_errors_get_a_hint() -> None:
    with pytest.raises(ModelNotFoundError, match="Did you mean smollm2-135m"):
        resolve_source("smollm-135m")


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = use_hub(monkeypatch, lambda **_: str(tmp_path))
    assert resolve_source("org/name") == tmp_path
    assert calls[0]["name"] == "org/name"
    assert "*.safetensors" in calls[0]["allow_patterns"]
    assert "*.bin" not in calls[0]["allow_patterns"]


def test_hub_falls_back_to_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(local_files_only: bool = False, **_: Any) -> str:
        if not local_files_only:
            raise OSError("unreachable")
        return str(tmp_path)

    use_hub(monkeypatch, answer)
    assert resolve_source("org/name") == tmp_path


def test_hub_unreachable_and_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(**_: Any) -> str:
        raise LocalEntryNotFoundError("not here")

    use_hub(monkeypatch, answer)
    with pytest.raises(DownloadError, match="org/name"):
        resolve_source("org/name")
