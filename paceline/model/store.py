"""The folder where fetched and converted models live, and how they get there whole.

    $PACELINE_HOME/            default ~/.cache/paceline
      models/<key>/            one finished checkpoint; `paceline.json` lists its files and their sizes
      tmp/<random>/            work in progress; never read by anyone else

A checkpoint is built in `tmp/` and enters `models/` by one rename, so a folder that is there is complete.
Processes that build the same model at once do not wait for each other: the first rename wins and the others
drop their copy.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.errors import CorruptFileError, ModelError

MARKER = "paceline.json"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_ABANDONED_AFTER = 24 * 3600.0  # seconds; no build takes a day, so what is older was left by a killed process


def paceline_home() -> Path:
    """The cache folder: `$PACELINE_HOME`, or `~/.cache/paceline`. It need not exist yet."""
    return Path(os.environ.get("PACELINE_HOME") or "~/.cache/paceline").expanduser().absolute()


def model_folder(key: str) -> Path:
    """Where the checkpoint with this key belongs; it need not exist yet."""
    return paceline_home() / "models" / key


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A fresh folder on the cache's file system, removed afterwards whatever happened.

    Raises:
        ModelError: the cache cannot be written, or the disk filled up in the meantime.
    """
    root = paceline_home() / "tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        folder = Path(tempfile.mkdtemp(dir=root))
    except OSError as error:
        raise _cannot_write(error) from error
    try:
        yield folder
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise _cannot_write(error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the marker: `facts` plus the name and size in bytes of every file now in `folder`."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / MARKER).write_text(json.dumps({**facts, "files": files}, indent=1), encoding="utf-8")


def install(built: Path, key: str, *, replace: bool = False) -> Path:
    """Move a sealed folder into the cache.

    Args:
        built: a folder inside `work_folder()`, on the cache's file system.
        key: its name under `models/`.
        replace: put it in place of an existing one; otherwise the existing one stays and `built` is ignored.

    Returns:
        The folder in the cache.
    """
    target = model_folder(key)
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(8):  # another process may put its own copy there between the two renames
        if replace:
            # Moved aside first: a rename cannot replace a folder that has files in it.
            with contextlib.suppress(FileNotFoundError):
                target.rename(Path(tempfile.mkdtemp(dir=built.parent)) / "old")
        try:
            built.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            if not replace:
                return target
        else:
            return target
    return target


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The facts that `seal` wrote, or None where there is no such checkpoint.

    Raises:
        CorruptFileError: the folder exists without a readable marker.
    """
    if not folder.is_dir():
        return None
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError("is missing or unreadable.", field=str(folder / MARKER)) from error
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        raise CorruptFileError("does not list the checkpoint's files.", field=str(folder / MARKER))
    return marker


def check_files(folder: Path, marker: dict[str, Any]) -> None:
    """Compare every file with the marker and read the weights' header: milliseconds, no hashing.

    Raises:
        CorruptFileError: a file is missing, has another size, or is not a safetensors file; names the file.
    """
    for name, size in marker["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CorruptFileError(f"{state}.", field=str(path))
        if path.suffix == ".safetensors":
            check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Read the header of a safetensors file; it must account for the file's whole length.

    Raises:
        CorruptFileError: it is truncated, damaged or something else; names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"is not a complete safetensors file ({error}).", field=str(path)) from error


def _remove_abandoned(root: Path) -> None:
    for path in root.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True)


def _cannot_write(error: OSError) -> ModelError:
    return ModelError(
        f"cannot be written ({error.strerror or error}).",
        field=str(paceline_home()),
        fix="Free some space, or set PACELINE_HOME to a folder that can be written.",
    )
