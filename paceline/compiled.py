"""Code that Numba compiles for the CPU at hand, and where it is kept.

Numba finds kept code by the file of the function that was asked for, and would run it although a file that this one
imports is another since an update. So it lies in a folder named by a digest of all files that are compiled: beside the
package, or in the user's cache where the package cannot be written. Without a place to write, every start compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numba

_ROOT = Path(__file__).parent
_COMPILED = (
    "compiled.py",
    "engine/race.py",
    "engine/rng.py",
    "draft/suffixes/*.py",
    "model/kernels/layout.py",
    "model/native/*.py",
)
"""Files whose content decides what machine code comes of them."""
_PREFIX = "compiled-"


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function of a module that Python calls: compiled when first called, and kept.

    Args:
        options: further ones of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        with _keeping() as keeps:
            return numba.njit(nogil=True, error_model="numpy", cache=keeps, **options)(function)

    return decorate


def address_of(function: Callable[..., Any], signature: str) -> int:
    """The address of a function of a module as C code calls it: compiled now, and kept."""
    with _keeping() as keeps:
        return int(numba.cfunc(signature, cache=keeps, error_model="numpy")(function).address)


def digest(root: Path = _ROOT) -> str:
    """Names and contents of all files that are compiled."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in _COMPILED for path in root.glob(pattern)):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


@contextlib.contextmanager
def _keeping() -> Iterator[bool]:
    """Let Numba keep what is compiled here in our folder; whether there is one."""
    folder, before = _folder(), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or before)
    try:
        yield folder is not None
    finally:
        numba.config.CACHE_DIR = before


@cache
def _folder() -> Path | None:
    """Where this version's code is kept; that of others beside this package goes."""
    own = _ROOT / "__pycache__"
    for place in (own, Path("~/.cache/paceline").expanduser()):
        folder = place / f"{_PREFIX}{digest()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            for other in own.glob(f"{_PREFIX}*") if place == own else ():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            return folder
    return None
