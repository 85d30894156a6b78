"""Damaged GGUF files: whatever is wrong, conversion succeeds or ends in a typed error that names the file.

Seeded, so that a failure is found again: of bytes anywhere in the header, and of every metadata value by its key. That
nothing is read outside the file follows from the reader (every access is checked, or a slice); that little memory and
time is spent on a small file is measured here.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf_files as tiny
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from gguf_bytes import ARRAY, BOOL, FLOAT, I32, STRING, U32, encoded, entry, file_of, string, tensor

from paceline.errors import CorruptFileError, UnsupportedModelError
from paceline.model.gguf import convert
from paceline.model.gguf_reader import GgufFile

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 62,
    (1 << 64) - 1,
)
OPTIONAL = (  # keys that the reader looks at and the file does not have
    "general.alignment",
    "general.type",
    "split.count",
    "llama.expert_count",
    "llama.attention.sliding_window",
    "llama.attention.value_length",
    "llama.rope.dimension_count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.unknown_token_id",
)
VALUES = [
    *((U32, struct.pack("<I", n)) for n in (0, 1, 2, 5, 63, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)),
    *((I32, struct.pack("<i", n)) for n in (-1, -(1 << 31))),
    *((10, struct.pack("<Q", n)) for n in (0, 1 << 32, (1 << 64) - 1)),
    *((FLOAT, struct.pack("<f", x)) for x in (0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan"))),
    *((12, struct.pack("<d", x)) for x in (5e-324, 1e308)),
    (BOOL, b"\1"),
    *((STRING, string(text)) for text in (b"", b"x", b"linear", b"yarn")),
    (ARRAY, struct.pack("<IQ", U32, 0)),
    (ARRAY, struct.pack("<IQI", U32, 1, 7)),
    (ARRAY, struct.pack("<IQ", STRING, 1) + string(b"a")),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    tiny.write_gguf(path, "llama", tiny.make_model("llama"), Kind.Q4_1)
    return path


class Trial:
    """Converts one file after another, and remembers the most that any of them took."""

    def __init__(self, folder: Path) -> None:
        self._path, self._out = folder / "fuzz.gguf", folder / "out"
        self._out.mkdir()
        self.seconds = 0.0
        self.outcomes: set[str] = set()

    def __call__(self, content: bytes) -> None:
        self._path.write_bytes(content)
        started = time.perf_counter()
        tracemalloc.start()
        try:
            convert(self._path, self._out)
            outcome = "fine"
        except (CorruptFileError, UnsupportedModelError) as error:
            outcome = type(error).__name__ if "fuzz.gguf" in str(error) else f"no file named: {error}"
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 16 << 20
        self.seconds = max(self.seconds, time.perf_counter() - started)
        self.outcomes.add(outcome)


@pytest.mark.parametrize("seed", range(3))
def test_bytes_of_the_header(tmp_path: Path, good: Path, seed: int) -> None:
    """Flipped, overwritten by numbers near powers of two, cut out, put in, copied from elsewhere, and cut off."""
    content, rng, trial = good.read_bytes(), random.Random(seed), Trial(tmp_path)
    end = content.index(b"token_embd.weight") + 2000
    for _ in range(150):
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 4))):
            _damage(data, rng, min(end, len(data)))
        trial(bytes(data))
    assert {"fine", "CorruptFileError"} <= trial.outcomes <= {"fine", "CorruptFileError", "UnsupportedModelError"}
    assert trial.seconds < 10  # milliseconds, if the machine is idle


def _damage(data: bytearray, rng: random.Random, end: int) -> None:
    at, size = rng.randrange(end), rng.randrange(1, 64)
    match rng.randrange(7):
        case 0:
            data[at] = rng.randrange(256)
        case 1:
            data[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        case 2:
            data[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        case 3:
            del data[at : at + size]
        case 4:
            data[at:at] = rng.randbytes(size)
        case 5:
            other = rng.randrange(end)
            data[at : at + size] = data[other : other + size]
        case _:
            del data[max(1, rng.randrange(len(data))) :]


def test_every_metadata_value(tmp_path: Path, good: Path) -> None:
    """Each key in turn has values of every type, from nothing to huge, or is missing; the rest of the file is sound."""
    with GgufFile(good) as file:
        pairs = {key: encoded(key, value) for key, value in file.metadata.items()}
        described, data = _tensors(file)
    trial = Trial(tmp_path)
    trial(file_of(list(pairs.values()), described, data))
    assert trial.outcomes == {"fine"}, "what is changed below is right to begin with"
    for key in (*pairs, *OPTIONAL):
        others = [pair for name, pair in pairs.items() if name != key]
        trial(file_of(others, described, data))
        for kind, value in VALUES:
            trial(file_of([*others, entry(key.encode(), kind, value)], described, data))
    assert trial.outcomes == {"fine", "CorruptFileError", "UnsupportedModelError"}


def _tensors(file: GgufFile) -> tuple[list[bytes], bytes]:
    """Descriptions and data of all tensors, side by side."""
    described: list[bytes] = []
    data = b""
    for one in file.tensors.values():
        described.append(tensor(one.name.encode(), one.shape[::-1], int(one.kind), len(data)))
        stored: Any = file.stored(one.name)
        data += np.ascontiguousarray(stored).tobytes()
        data += bytes(-len(data) % 32)
    return described, data
