"""Read a GGUF file that nobody vouches for.

The layout is that of the GGUF specification, versions 2 and 3, little-endian: a header, key-value metadata,
tensor descriptions, padding, tensor data. Every length and offset is checked against the file before it is
used, so a truncated, damaged or hostile file ends in `CorruptFileError`: it cannot make the reader loop,
allocate without bound or look outside the file. (The `gguf` package's own reader slices past the end silently
and trusts counts, so only its tables of types and its dequantisation are used here.)
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from paceline.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError

MAX_DIMS = 4
MAX_STRINGS = 1 << 22  # entries of one string array; the largest vocabularies have 2^18
_ROWS_BYTES = 64 << 20  # dequantise about this many output bytes at a time

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    _BOOL: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as in PyTorch."""
    kind: GGMLQuantizationType
    start: int
    """Offset of its first byte in the file."""
    nbytes: int
    """Stored size."""

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


class GgufFile:
    """An open GGUF file: `metadata` by key, `tensors` by name. Use as a context manager.

    Metadata values are Python numbers, booleans, strings, lists of strings, or numpy arrays of numbers.

    Raises:
        ModelNotFoundError: the file cannot be opened.
        CorruptFileError: it is not a complete, consistent GGUF file.
        UnsupportedModelError: it is one, of a version, byte order or tensor type that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # mmap refuses an empty file
            raise CorruptFileError("is empty.", field=str(path)) from error
        except OSError as error:
            raise ModelNotFoundError(f"cannot be opened ({error.strerror}).", field=str(path)) from error
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._map.close()

    def stored(self, name: str, low: int = 0, high: int | None = None) -> npt.NDArray[np.uint8]:
        """The bytes of rows `low` to `high` (all by default) of one tensor.  # [rows, bytes of a row]"""
        tensor = self.tensors[name]
        rows = tensor.numel // tensor.shape[-1]
        row_bytes = tensor.nbytes // rows
        high = rows if high is None else high
        # Copied out of the map, so that no array keeps the file open.
        raw = self._map[tensor.start + low * row_bytes : tensor.start + high * row_bytes]
        return np.frombuffer(raw, dtype=np.uint8).reshape(high - low, row_bytes)

    def dequantise(self, name: str) -> npt.NDArray[np.float32]:
        """The values of one tensor, in its shape.

        Raises:
            UnsupportedModelError: its type cannot be dequantised.
            CorruptFileError: it holds NaN or infinity.
        """
        tensor = self.tensors[name]
        out = np.empty(tensor.shape, dtype=np.float32)
        flat = out.reshape(-1, tensor.shape[-1])
        step = max(1, _ROWS_BYTES // (4 * tensor.shape[-1]))
        for low in range(0, len(flat), step):
            high = min(len(flat), low + step)
            try:
                # Infinite scales of a damaged file are reported below, not as numpy warnings.
                with np.errstate(all="ignore"):
                    flat[low:high] = dequantize(self.stored(name, low, high), tensor.kind)
            except NotImplementedError as error:
                _unsupported_kind(self.path, name, tensor.kind.name, error)
        if not np.isfinite(out).all():
            raise CorruptFileError(f"tensor {name!r} holds NaN or infinity.", field=str(self.path))
        return out

    def _parse(self) -> None:
        cursor = _Cursor(self._map, self.path)
        if cursor.take(4) != b"GGUF":
            cursor.corrupt("it does not begin with the GGUF signature")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            what = (
                "is a big-endian GGUF file." if big else f"has GGUF version {version}; versions 2 and 3 are supported."
            )
            raise UnsupportedModelError(what, field=str(self.path))
        tensor_count, pair_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        cursor.check_count(pair_count, 13, "metadata entries")
        cursor.check_count(tensor_count, 32, "tensors")
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                cursor.corrupt(f"metadata key {key!r} appears twice")
            self.metadata[key] = cursor.value(key)
        described = [self._tensor(cursor) for _ in range(tensor_count)]
        self.tensors = self._place(described, cursor)

    def _tensor(self, cursor: _Cursor) -> GgufTensor:
        name = cursor.string("a tensor name")
        dims = cursor.scalar("<I")
        if not 1 <= dims <= MAX_DIMS:
            cursor.corrupt(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dims))[::-1]
        kind_id, start = cursor.scalar("<I"), cursor.scalar("<Q")
        try:
            kind = GGMLQuantizationType(kind_id)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            _unsupported_kind(self.path, name, f"number {kind_id}", error)
        # Sizes are Python integers: a product of four 64-bit dimensions cannot wrap around.
        if math.prod(shape) == 0 or shape[-1] % block:
            cursor.corrupt(f"tensor {name!r} has the impossible shape {list(shape)} for type {kind.name}")
        return GgufTensor(name, shape, kind, start, math.prod(shape) // block * block_bytes)

    def _place(self, described: list[GgufTensor], cursor: _Cursor) -> dict[str, GgufTensor]:
        """Turn offsets into positions in the file, and check that the tensors lie in it side by side."""
        align = self.metadata.get("general.alignment", 32)
        if type(align) is not int or not 1 <= align <= 1 << 20 or align & (align - 1):
            cursor.corrupt(f"general.alignment is {align!r}")
        data_start = -(-cursor.at // align) * align
        tensors: dict[str, GgufTensor] = {}
        end = data_start
        for tensor in sorted(described, key=lambda t: t.start):
            start = data_start + tensor.start
            if tensor.name in tensors:
                cursor.corrupt(f"tensor {tensor.name!r} appears twice")
            # Overlap is refused because it would let a small file expand into a huge checkpoint.
            if start < end or start % align:
                cursor.corrupt(f"tensor {tensor.name!r} overlaps another one or is not aligned")
            end = start + tensor.nbytes
            if end > len(self._map):
                cursor.corrupt(f"tensor {tensor.name!r} ends {end - len(self._map)} bytes after the end of the file")
            tensors[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.kind, start, tensor.nbytes)
        return tensors


def scalar(metadata: dict[str, Any], key: str, default: Any, path: Path) -> Any:
    """The value of a metadata key that must not be an array, which would compare and hash like nothing else.

    Raises:
        CorruptFileError: it is one.
    """
    value = metadata.get(key, default)
    if isinstance(value, list | np.ndarray):
        raise CorruptFileError(f"is not a valid GGUF file: {key!r} is an array.", field=str(path))
    return value


class _Cursor:
    """A position in the file; every read is checked against its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self.at = 0

    def corrupt(self, what: str) -> NoReturn:
        raise CorruptFileError(f"is not a valid GGUF file: {what}.", field=str(self._path), fix="Fetch it again.")

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            self.corrupt(f"it ends too early, {count} bytes were expected at offset {self.at}")
        self.at += count
        return self._data[self.at - count : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count of things that could not fit in what is left of the file."""
        if count * least_bytes > len(self._data) - self.at:
            self.corrupt(f"it claims {count} {what}, more than fit in it")

    def string(self, what: str) -> str:
        raw = self.take(self.scalar("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.corrupt(f"{what} is not UTF-8 text")

    def value(self, key: str) -> Any:
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.string(f"metadata {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self.corrupt(f"metadata {key!r} has the unknown type {kind}")
        number = self.scalar(_SCALARS[kind])
        return bool(number) if kind == _BOOL else number

    def _array(self, key: str) -> Any:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            self.check_count(count, 8, f"strings in {key!r}")
            if count > MAX_STRINGS:
                self.corrupt(f"it claims {count} strings in {key!r}")
            return [self.string(f"an entry of {key!r}") for _ in range(count)]
        if kind not in _SCALARS:
            self.corrupt(f"metadata {key!r} is an array of the unsupported type {kind}")
        code = _SCALARS[kind]
        return np.frombuffer(self.take(count * struct.calcsize(code)), dtype=np.dtype(code))


def _unsupported_kind(path: Path, tensor: str, kind: str, cause: Exception) -> NoReturn:
    raise UnsupportedModelError(
        f"tensor {tensor!r} has type {kind}, which cannot be dequantised.", field=str(path)
    ) from cause
