"""Training text on disk and in memory: documents of token ids, and which of them the target wrote as an answer.

A shard is a safetensors file of three arrays: `tokens` (all documents end to end), `own` (1 where the token is the
target's own answer, 0 in prompts and chat framing), `lengths` (tokens of each document). It is written under another
name and renamed, so a shard that is there is whole; its header carries a SHA-256 that catches later damage.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.arrays import BoolArray, IntArray
from paceline.errors import CorruptFileError

_REPEATS = 3
"""A text whose end says the same thing this often again has fallen into a loop."""
_LONGEST_PERIOD = 64
_SHORTEST_LOOP = 24
"""Tokens; a shorter repetition (a row of dashes, "ha ha ha") may be meant."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents end to end."""

    tokens: NDArray[np.int32]  # [num_tokens]
    own: BoolArray  # [num_tokens]
    lengths: IntArray  # [num_documents]

    @property
    def starts(self) -> IntArray:
        """Index of each document's first token.  # [num_documents]"""
        return np.cumsum(self.lengths) - self.lengths

    def select(self, which: IntArray) -> Documents:
        """Some of the documents, in the order given."""
        starts = self.starts
        slices = [slice(starts[i], starts[i] + self.lengths[i]) for i in which]
        return join([(self.tokens[s], self.own[s]) for s in slices])


def join(pairs: Iterable[tuple[NDArray[np.int32], BoolArray]]) -> Documents:
    """Documents from (tokens, own) of each."""
    kept = list(pairs)
    tokens = np.concatenate([t for t, _ in kept]) if kept else np.zeros(0, dtype=np.int32)
    own = np.concatenate([o for _, o in kept]) if kept else np.zeros(0, dtype=np.bool_)
    return Documents(tokens.astype(np.int32), own.astype(np.bool_), np.array([len(t) for t, _ in kept], dtype=np.int64))


class Collection:
    """Documents gathered one by one, each once."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._kept: list[tuple[NDArray[np.int32], BoolArray]] = []
        self._seen: set[bytes] = set()

    def add(self, tokens: NDArray[np.int32], own: BoolArray) -> None:
        """Take a document, unless it is there already."""
        digest = hashlib.sha256(tokens.tobytes()).digest()
        if digest not in self._seen:
            self._seen.add(digest)
            self._kept.append((tokens, own))
            self.num_tokens += len(tokens)

    def add_all(self, documents: Documents) -> None:
        """Take what is new of `documents`."""
        for start, length in zip(documents.starts, documents.lengths, strict=True):
            piece = slice(start, start + length)
            self.add(documents.tokens[piece], documents.own[piece])

    def documents(self) -> Documents:
        """All of them."""
        return join(self._kept)


def clean(pairs: Iterable[tuple[NDArray[np.int32], BoolArray]]) -> Documents:
    """Cut loops short, and drop documents without an answer and repeated ones."""
    kept = Collection()
    for tokens, own in pairs:
        end = loop_start(tokens)
        if own[:end].any():
            kept.add(tokens[:end], own[:end])
    return kept.documents()


def loop_start(tokens: NDArray[np.int32]) -> int:
    """How many tokens to keep of a text that ends in a loop (two rounds of it); all of any other text."""
    best = len(tokens)
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // 2) + 1):
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        run = len(tokens) - period - (int(differs[-1]) + 1 if len(differs) else 0)  # trailing t[i] == t[i - period]
        if run >= _REPEATS * period and run >= _SHORTEST_LOOP:
            best = min(best, len(tokens) - run + period)
    return best


def shard_path(folder: Path, index: int) -> Path:
    """The file of shard `index`."""
    return folder / f"shard-{index:05d}.safetensors"


def save_shard(path: Path, documents: Documents) -> None:
    """Write a shard so that it is there whole or not at all."""
    from safetensors.numpy import save_file

    arrays: dict[str, NDArray[Any]] = {
        "tokens": documents.tokens,
        "own": documents.own.astype(np.uint8),
        "lengths": documents.lengths.astype(np.int32),
    }
    part = path.with_suffix(".part")
    save_file(arrays, part, metadata={"sha256": _digest(arrays)})
    os.replace(part, path)


def load_shard(path: Path) -> Documents:
    """Read a shard.

    Raises:
        CorruptFileError: it is truncated, damaged or something else; names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in ("tokens", "own", "lengths")}
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, KeyError) as error:
        raise _corrupt(path, f"is not a complete shard of training text ({error}).") from error
    if _digest(arrays) != expected or int(arrays["lengths"].sum()) != len(arrays["tokens"]):
        raise _corrupt(path, "is damaged: its checksum is another.")
    return Documents(arrays["tokens"], arrays["own"].astype(np.bool_), arrays["lengths"].astype(np.int64))


def load_documents(paths: Sequence[Path]) -> Documents:
    """All documents of some shards; one that occurs in several counts once.

    Raises:
        CorruptFileError: a shard is damaged; names the file.
    """
    kept = Collection()
    for path in paths:
        kept.add_all(load_shard(path))
    return kept.documents()


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(what, field=str(path), fix="Delete this file; the same command then writes it again.")
