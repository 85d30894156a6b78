"""`train vocab`: which tokens occur most, for a draft head over a part of the vocabulary (FR-Spec, 2502.14856).

Counts come from text files or from the training text that a target wrote. The ranked list is made once and offline;
tokens that end a text are always in it, and where the text knows fewer tokens than wanted the lowest ids fill it up
(in BPE vocabularies those were merged first, so they are the commoner ones).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline.arrays import IntArray
from paceline.errors import ConfigError, InputError
from paceline.train.documents import load_shard

_CHUNK = 1 << 20
"""Characters tokenised at once."""
Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes there are."""


def count_tokens(
    sources: Sequence[Path], tokenizer: Any, vocab_size: int, on_progress: Progress = lambda _done, _all: None
) -> IntArray:
    """How often each token occurs.

    Args:
        sources: text files, and folders with training text (of which the target's own answers count).
        tokenizer: of the target.
        vocab_size: of the target.

    Returns:
        Counts.  # [vocab_size]

    Raises:
        InputError: a file cannot be read.
        CorruptFileError: a shard is damaged.
    """
    files = [file for source in sources for file in _files(source)]
    total, done = sum(file.stat().st_size for file in files), 0
    counts = np.zeros(vocab_size, dtype=np.int64)
    for file in files:
        if file.suffix == ".safetensors":
            shard = load_shard(file)
            counts += _counted(shard.tokens[shard.own], vocab_size)
        else:
            for text in _pieces(file):
                ids = tokenizer.encode(text, add_special_tokens=False)
                counts += _counted(np.array(ids, dtype=np.int64), vocab_size)
                on_progress(min(done + len(text), total), total)
        done += file.stat().st_size
        on_progress(done, total)
    return counts


def rank(counts: IntArray, size: int, end_tokens: Sequence[int]) -> IntArray:
    """The ids of the `size` most frequent tokens, most frequent first, end tokens forced in.  # [size]

    Raises:
        ConfigError: there are not that many tokens, or fewer are wanted than end a text.
    """
    if not len(end_tokens) < size <= len(counts):
        raise ConfigError(f"is {size}; give {len(end_tokens) + 1} to {len(counts)}.", field="size")
    order = np.argsort(-counts, kind="stable")
    kept = order[:size]
    missing = [token for token in end_tokens if token not in kept]
    if missing:
        replaceable = [i for i in range(size - 1, -1, -1) if kept[i] not in end_tokens][: len(missing)]
        kept = np.concatenate([np.delete(kept, replaceable), np.array(missing, dtype=kept.dtype)])
    return kept.astype(np.int64)


def save_ranking(path: Path, ids: IntArray, counts: IntArray, about: dict[str, Any]) -> float:
    """Write the list as `.npy` (ids only) or `.json` (with facts); returns the share of the text it covers.

    Raises:
        ConfigError: the file's name ends with neither.
    """
    check_name(path)
    coverage = float(counts[ids].sum() / max(int(counts.sum()), 1))
    part = path.with_name(path.name + ".part")
    if path.suffix == ".npy":
        with part.open("wb") as file:
            np.save(file, ids.astype(np.int32))
    else:
        facts = {**about, "coverage": coverage, "counted_tokens": int(counts.sum()), "token_ids": ids.tolist()}
        part.write_text(json.dumps(facts), encoding="utf-8")
    os.replace(part, path)
    return coverage


def check_name(path: Path) -> None:
    """Refuse a name whose ending says no known format.

    Raises:
        ConfigError: it ends with neither .npy nor .json.
    """
    if path.suffix not in (".npy", ".json"):
        raise ConfigError(f"is {path}; end the name with .npy or .json.", field="out")


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        shards = sorted(source.glob("shard-*.safetensors"))
        if not shards:
            raise InputError("holds no shards of training text.", field=str(source))
        return shards
    if not source.is_file():
        raise InputError("no such file or folder.", field=str(source))
    return [source]


def _pieces(file: Path) -> Iterator[str]:
    """A text file in pieces of whole lines."""
    lines: list[str] = []
    size = 0
    try:
        with file.open(encoding="utf-8") as text:
            for line in text:
                lines.append(line)
                size += len(line)
                if size >= _CHUNK:
                    yield "".join(lines)
                    lines, size = [], 0
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read as text ({error}).", field=str(file)) from error
    if lines:
        yield "".join(lines)


def _counted(ids: Any, vocab_size: int) -> IntArray:
    return np.bincount(ids[ids < vocab_size], minlength=vocab_size)
