"""From what the user calls a model to a checkpoint folder on this machine."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from pathlib import Path

from paceline.errors import CorruptFileError, DownloadError, ModelNotFoundError, UnsupportedModelError
from paceline.model import store
from paceline.model.builtin import ALIASES, BUILTIN_MODELS, fetch_builtin, is_builtin
from paceline.model.convert import CONVERTER_VERSION, build_checkpoint
from paceline.model.progress import reporting

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
_FORMS = "Take a built-in name ({names}), a model folder, a .gguf file, or a hub id (org/name)."


def resolve_source(name: str, *, force: bool = False) -> Path:
    """Find a model, fetching or converting it if that has not happened yet.

    Args:
        name: a built-in name, a checkpoint folder, a `.gguf` file, or a hub id `org/name`. Built-in names win
            over folders of the same name (write `./name` for the folder), and existing paths win over hub
            ids.
        force: fetch or convert again and replace the cached copy; a folder is taken as it is.

    Returns:
        The checkpoint folder.

    Raises:
        ModelNotFoundError: nothing has this name.
        DownloadError: the index or the hub could not be reached and there is no local copy.
        CorruptFileError, UnsupportedModelError: a GGUF file, or a cached copy, that cannot be used.
    """
    if is_builtin(name):
        return fetch_builtin(name, force=force)
    if not name.strip():
        raise _not_found(name, "is empty.")
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _folder(path, name)
        if path.is_file():
            return _file(path, name, force)
    except (OSError, ValueError) as error:  # a name too long for the file system, or with a null character
        raise _not_found(name, "is not a usable path.") from error
    looks_like_path = name.startswith((".", "~", os.sep)) or name.lower().endswith((".gguf", ".safetensors"))
    if not looks_like_path and _HUB_ID.fullmatch(name):
        return _from_hub(name, force)
    raise _not_found(name, "no such file or folder." if looks_like_path else "no such model.")


def convert_local_gguf(path: Path, *, force: bool = False) -> Path:
    """The checkpoint folder of a local GGUF file, converted at the first call.

    The conversion is kept under the file's path, size and modification time; a damaged one is made again.

    Raises:
        CorruptFileError, UnsupportedModelError: the file is damaged, or a kind that cannot be run.
    """
    facts = path.stat()
    identity = f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{CONVERTER_VERSION}"
    stem = re.sub(r"[^\w.-]+", "-", path.stem)[:60]
    key = f"gguf-{stem}-{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:16]}"
    folder = store.model_folder(key)
    try:
        marker = store.read_marker(folder)
        if marker is not None and not force:
            store.check_files(folder, marker)
            return folder
    except CorruptFileError:
        force = True  # the original is at hand
    with store.work_folder() as work, reporting(f"Converting {path.name} (once)") as reporter:
        built = build_checkpoint(path, work / "checkpoint", {"source": str(path)}, reporter)
        return store.install(built, key, replace=force)


def _folder(path: Path, name: str) -> Path:
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    ggufs = sorted(path.glob("*.gguf"))
    fix = f"Give the file itself: {ggufs[0]}." if ggufs else "A model folder has config.json and *.safetensors."
    raise ModelNotFoundError("is a folder without config.json.", field=name, fix=fix)


def _file(path: Path, name: str, force: bool) -> Path:
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    # A foreign file that is called .gguf goes to the reader too, whose message says what is wrong with it.
    if is_gguf or path.suffix.lower() == ".gguf":
        return convert_local_gguf(path, force=force)
    fix = f"Give the folder it lies in: {path.parent}." if (path.parent / "config.json").is_file() else None
    raise UnsupportedModelError("is not a GGUF file.", field=name, fix=fix or _forms())


def _from_hub(name: str, force: bool) -> Path:
    """The hub's current snapshot; the newest cached one where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, force_download=force))
    except GatedRepoError as error:
        fix = "Accept its terms on the hub and log in with `hf auth login`."
        raise ModelNotFoundError("is a gated model on the hub.", field=name, fix=fix) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _not_found(name, "no such folder here and no such model on the hub.") from error
    except Exception as error:  # the hub client lets its HTTP library's exceptions through
        reason = type(error).__name__
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
    except Exception as error:
        raise DownloadError(
            f"the hub could not be reached ({reason}) and the model is not in the local hub cache.",
            field=name,
            fix=f"Check the network, or use a local model. {_forms()}",
        ) from error


def _not_found(name: str, what: str) -> ModelNotFoundError:
    close = difflib.get_close_matches(name, [*BUILTIN_MODELS, *ALIASES], n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return ModelNotFoundError(what, field=_short(name), fix=hint + _forms())


def _short(name: str) -> str:
    return (name if len(name) <= 100 else name[:97] + "...") or "model"


def _forms() -> str:
    return _FORMS.format(names=", ".join([*BUILTIN_MODELS, *ALIASES]))
