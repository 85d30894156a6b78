"""GGUF files whose numbers overflow: counts, dimensions, offsets, lengths and alignments near every power of two.

Published for llama.cpp (CVE-2025-53630, GHSA-vgg9-87g3-85w8, GHSA-96jg-mvhq-q7q7, #15711, #18674, #24759, #24997,
#26690) and Ollama (CVE-2026-7482, CVE-2025-1975): sums and products that wrap around pass a check and are then read.
Files are written byte by byte here, so that one number at a time is wrong.
"""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf_bytes import F32, Q8_0, entry, file_of, string, tensor

from paceline.errors import CorruptFileError, PacelineError, UnsupportedModelError
from paceline.model.gguf_reader import GgufFile

TOP = (1 << 31, (1 << 32) - 1, 1 << 32, 1 << 42, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)


def refused(tmp_path: Path, content: bytes) -> PacelineError:
    """The typed error that reading ends in, within a few megabytes of memory."""
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises((CorruptFileError, UnsupportedModelError)) as caught, GgufFile(path):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "hostile.gguf" in str(caught.value)
    return caught.value


def test_a_sound_file_of_this_kind_is_read(tmp_path: Path) -> None:
    """What the tests below change is right to begin with."""
    path = tmp_path / "sound.gguf"
    path.write_bytes(
        file_of(
            [entry(b"a", 4, struct.pack("<I", 7))], [tensor(b"t", (8, 8)), tensor(b"u", (1,), F32, 256)], bytes(288)
        )
    )
    with GgufFile(path) as file:
        assert file.metadata == {"a": 7}
        assert file.tensors["t"].shape == (8, 8)
        assert file.dequantise("t").sum() == 0


@pytest.mark.parametrize("count", TOP)
def test_counts(tmp_path: Path, count: int) -> None:
    """More tensors or entries than fit in the file; times their size they would wrap around."""
    refused(tmp_path, file_of([], [tensor(b"t", (8,))], counts=(count, 0)))
    refused(tmp_path, file_of([], [], counts=(0, count)))
    refused(tmp_path, file_of([], [], counts=(count, count)))


@pytest.mark.parametrize("length", TOP)
def test_lengths_of_strings_and_arrays(tmp_path: Path, length: int) -> None:
    """Keys, values, tensor names, arrays of numbers and of strings that claim more than there is."""
    refused(tmp_path, file_of([string(b"a", length) + struct.pack("<II", 4, 0)], []))
    refused(tmp_path, file_of([entry(b"a", 8, string(b"x", length))], []))
    refused(tmp_path, file_of([], [string(b"t", length) + struct.pack("<IQIQ", 1, 8, F32, 0)]))
    for kind in (0, 4, 10, 12, 8):
        refused(tmp_path, file_of([entry(b"a", 9, struct.pack("<IQ", kind, length))], []))
    refused(tmp_path, file_of([entry(b"a", 9, struct.pack("<IQ", 8, 1) + string(b"x", length))], []))


@pytest.mark.parametrize("size", TOP)
def test_dimensions(tmp_path: Path, size: int) -> None:
    """Sizes whose product with the others, or with the bytes of an element, is a multiple of 2^64."""
    for dims in ((size,), (8, size), (size, 8), (size, size), (size, size, size, size), (1, 1, 1, size)):
        for kind in (F32, Q8_0):
            refused(tmp_path, file_of([], [tensor(b"t", dims, kind)]))
    refused(tmp_path, file_of([], [tensor(b"t", (size, 0))]))


@pytest.mark.parametrize("dims", [(1 << 32, 1 << 32), (1 << 62, 4), (1 << 61, 2, 4), (1 << 16,) * 4, (1 << 63, 2)])
def test_products_that_wrap_to_nothing(tmp_path: Path, dims: tuple[int, ...]) -> None:
    """In 64 bits these shapes have no element at all (llama.cpp #18674: 2^42 + 1 rows)."""
    refused(tmp_path, file_of([], [tensor(b"t", dims)]))
    refused(tmp_path, file_of([], [tensor(b"t", (dims[0] + 1, *dims[1:]))]))


@pytest.mark.parametrize("offset", [*TOP, 1, 31, 33, 224, 256, 288])
def test_offsets(tmp_path: Path, offset: int) -> None:
    """Offsets after the end, before the beginning by wrapping, between alignments, and ones that end outside."""
    refused(tmp_path, file_of([], [tensor(b"t", (64,), F32, offset)]))
    refused(tmp_path, file_of([], [tensor(b"t", (1,)), tensor(b"u", (64,), F32, offset)]))


def test_offsets_that_overlap(tmp_path: Path) -> None:
    """A hundred tensors on the same bytes would make a small file a large checkpoint."""
    refused(tmp_path, file_of([], [tensor(b"t%d" % i, (64,)) for i in range(100)]))
    refused(tmp_path, file_of([], [tensor(b"t", (64,)), tensor(b"u", (8,), F32, 32)]))
    refused(tmp_path, file_of([], [tensor(b"t", (8,)), tensor(b"t", (8,), F32, 32)]))


@pytest.mark.parametrize("count", [0, 5, 6, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1])
def test_numbers_of_dimensions(tmp_path: Path, count: int) -> None:
    """None, more than four, more than there are bytes (ggml #709)."""
    refused(tmp_path, file_of([], [tensor(b"t", (8,), count=count)]))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (4, struct.pack("<I", 0)),
        (4, struct.pack("<I", 3)),
        (4, struct.pack("<I", 1 << 31)),
        (4, struct.pack("<I", (1 << 32) - 1)),
        (10, struct.pack("<Q", 1 << 63)),
        (10, struct.pack("<Q", (1 << 64) - 1)),
        (5, struct.pack("<i", -32)),
        (11, struct.pack("<q", -(1 << 63))),
        (6, struct.pack("<f", 32.0)),
        (12, struct.pack("<d", float("nan"))),
        (7, b"\1"),
        (8, string(b"32")),
        (9, struct.pack("<IQI", 4, 1, 32)),
    ],
)
def test_alignments(tmp_path: Path, kind: int, value: bytes) -> None:
    """Zero, no power of two, huge, negative, and of another type (llama.cpp #24997 and #26318)."""
    refused(tmp_path, file_of([entry(b"general.alignment", kind, value)], [tensor(b"t", (8,))]))


@pytest.mark.parametrize("kind", [13, 255, 1 << 31, (1 << 32) - 1])
def test_unknown_types(tmp_path: Path, kind: int) -> None:
    """Of metadata, of array entries (also arrays of arrays, which could nest for ever) and of tensors."""
    refused(tmp_path, file_of([entry(b"a", kind, bytes(8))], []))
    for inner in (kind, 9):
        refused(tmp_path, file_of([entry(b"a", 9, struct.pack("<IQ", inner, 1) + bytes(64))], []))
    refused(tmp_path, file_of([], [tensor(b"t", (8,), kind)]))


def test_a_file_that_ends_inside_its_last_tensor(tmp_path: Path) -> None:
    """Ollama CVE-2026-7482: the declared size was believed, and what lay behind it in memory was read."""
    for missing in (1, 4, 255, 256):
        refused(tmp_path, file_of([], [tensor(b"t", (64,))], bytes(256 - missing)))
