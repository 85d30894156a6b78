"""GGUF files written byte by byte, so that any one number can be wrong."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

F32, Q8_0 = 0, 8
U32, I32, FLOAT, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def string(text: bytes, length: int | None = None) -> bytes:
    """A GGUF string that may claim another length."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    """One metadata entry."""
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = F32, offset: int = 0, count: int | None = None) -> bytes:
    """One tensor description; `count` is the number of dimensions that it claims."""
    head = string(name) + struct.pack("<I", len(dims) if count is None else count)
    return head + b"".join(struct.pack("<Q", dim) for dim in dims) + struct.pack("<IQ", kind, offset)


def file_of(
    pairs: list[bytes], tensors: list[bytes], data: bytes = bytes(256), counts: tuple[int, int] | None = None
) -> bytes:
    """A whole file, aligned to 32 bytes."""
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, pair_count) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def encoded(key: str, value: Any) -> bytes:
    """A metadata entry for a value as `GgufFile` reads it."""
    name = key.encode()
    if isinstance(value, bool):
        return entry(name, BOOL, struct.pack("<B", value))
    if isinstance(value, int):
        return entry(name, U32, struct.pack("<I", value))
    if isinstance(value, float):
        return entry(name, FLOAT, struct.pack("<f", value))
    if isinstance(value, str):
        return entry(name, STRING, string(value.encode()))
    if isinstance(value, np.ndarray):
        return entry(name, ARRAY, struct.pack("<IQ", I32, len(value)) + value.astype("<i4").tobytes())
    return entry(name, ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(string(v.encode()) for v in value))
