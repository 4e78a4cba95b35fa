"""safetensors files: the header checked against the file before anything is believed, then ranges of bytes.

Layout: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peftarray.dtypes import StorageDType, code_of, storage_dtype
from peftarray.errors import FormatError, UnsupportedError
from peftarray.stores.json_file import parse_json

__all__ = ["SafetensorsFile", "TensorInfo", "header_bytes", "save_file"]

_LENGTH = 8
_HEADER_LIMIT = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in a file.

    Attributes:
        name: its name.
        code: its dtype as the header spells it, known here or not.
        shape: its shape.
        begin, end: its bytes, counted from the start of the file.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def dtype(self) -> StorageDType:
        """The storage dtype.

        Raises:
            UnsupportedError: it is not known here; the bytes can be copied but not read as numbers.
        """
        dtype = storage_dtype(self.code)
        if dtype is None or dtype.numpy is None:
            message = f"{self.name} has dtype {self.code}, which cannot be read as numbers here; it can only be copied"
            raise UnsupportedError(message)
        return dtype

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape as stored rows and columns: all axes after the first flattened; the first two of a stack of three
        are kept apart by `formats` (an expert is a range of rows)."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape[1:])


class SafetensorsFile:
    """One file: its header, checked, and reads of byte ranges.

    Attributes:
        path: the file.
        size: its size in bytes.
        metadata: the `__metadata__` of the header.
        tensors: name -> `TensorInfo`, in the order of the bytes.
        data_begin: where the data start.

    Raises:
        FormatError: truncated, a header longer than the file or than 100 MB, invalid JSON, duplicate names, offsets
            that overlap or leave gaps, or sizes that do not follow from dtype and shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
            self.modified = os.fstat(self._descriptor).st_mtime_ns
            header = self._read_header()
        except OSError as error:
            message = f"{path} cannot be read ({error.strerror}); check the path and its permissions"
            raise FormatError(message) from None
        self.data_begin = _LENGTH + len(header)
        self.header = header
        entries = parse_json(header, f"the header of {path}")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            message = f"{path}: __metadata__ must map names to strings; save the file again"
            raise FormatError(message)
        self.metadata: dict[str, str] = metadata
        self.tensors = self._checked(entries)

    def _read_header(self) -> bytes:
        if self.size < _LENGTH:
            message = f"{self.path} has {self.size} bytes; a safetensors file has at least 8; it is truncated"
            raise FormatError(message)
        length = int.from_bytes(os.pread(self._descriptor, _LENGTH, 0), "little")
        if length > _HEADER_LIMIT:
            message = (
                f"{self.path} claims a header of {length} bytes; at most {_HEADER_LIMIT} are allowed; it is not a "
                "safetensors file or is damaged"
            )
            raise FormatError(message)
        if length > self.size - _LENGTH:
            message = (
                f"{self.path} claims a header of {length} bytes but has {self.size} in all; it is truncated; "
                "download it again"
            )
            raise FormatError(message)
        return os.pread(self._descriptor, length, _LENGTH)

    def _checked(self, entries: Mapping[str, object]) -> dict[str, TensorInfo]:
        found = [self._entry(name, entry) for name, entry in entries.items()]
        found.sort(key=lambda info: (info.begin, info.end))
        at = self.data_begin
        for info in found:
            if info.begin != at:
                kind = "overlaps the tensor before it" if info.begin < at else "leaves a gap before it"
                message = (
                    f"{self.path}: {info.name} {kind} (starts at byte {info.begin}, expected {at}); the file is damaged"
                )
                raise FormatError(message)
            at = info.end
        if at != self.size:
            what = "is truncated" if at > self.size else "has bytes after its last tensor"
            message = (
                f"{self.path} {what}: its header describes {at} bytes, the file has {self.size}; download or save "
                "it again"
            )
            raise FormatError(message)
        return {info.name: info for info in found}

    def _entry(self, name: str, entry: object) -> TensorInfo:
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
            sound = type(code) is str and type(shape) is list and len(shape) <= 32
            sound = sound and all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound or begin > end:
            message = (
                f"{self.path}: the header's entry of {name[:200]!r} is not {{dtype, shape, data_offsets}} with "
                "whole numbers; the file is damaged"
            )
            raise FormatError(message)
        dtype = storage_dtype(code)
        if dtype is not None and math.prod(shape) * dtype.bits != (end - begin) * 8:
            message = (
                f"{self.path}: {name} has shape {shape} of {code}, which does not make its {end - begin} bytes; "
                "the file is damaged"
            )
            raise FormatError(message)
        return TensorInfo(name, code, tuple(shape), self.data_begin + begin, self.data_begin + end)

    @property
    def descriptor(self) -> int:
        """The open file, for reads at an offset (which threads may share)."""
        return self._descriptor

    def read_into(self, buffer: memoryview | np.ndarray, offset: int) -> None:
        """Fill `buffer` from byte `offset` on.

        Raises:
            FormatError: the file ended before the buffer was full, or the disk failed.
        """
        # Arrays of ml_dtypes do not lend their memory; as bytes they do.
        view = buffer if isinstance(buffer, memoryview) else buffer.reshape(-1).view(np.uint8).data
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
                if count == 0:
                    message = (
                        f"{self.path} ended at byte {offset + done} while it was read; it was changed or truncated"
                    )
                    raise FormatError(message)
                done += count
        except OSError as error:
            message = f"{self.path} cannot be read at byte {offset + done} ({error.strerror}); check the disk"
            raise FormatError(message) from None

    @contextmanager
    def window(
        self, begin: int, shape: tuple[int, ...], dtype: np.dtype, *, whole: bool = True
    ) -> Iterator[np.ndarray]:
        """The bytes from `begin` on as a read-only array, without a copy; it must not be used after the block.

        A few megabytes at a time are mapped, so that the process does not seem to hold the whole file.

        Args:
            begin: the first byte.
            shape, dtype: what the bytes are.
            whole: whether all of it will be looked at, so that the kernel may fetch it at once.

        Raises:
            FormatError: the file has become shorter than its header says.
        """
        count = math.prod(shape) * dtype.itemsize
        if os.fstat(self._descriptor).st_size < begin + count:
            message = f"{self.path} was truncated while it was read; it ended before byte {begin + count}"
            raise FormatError(message)
        shift = begin % mmap.ALLOCATIONGRANULARITY
        aligned = count and not begin % dtype.itemsize
        pages = self._map(begin - shift, count + shift, whole=whole) if aligned else None
        if pages is None:
            array = np.empty(shape, dtype)
            self.read_into(array, begin)
            yield array
            return
        try:
            array = np.frombuffer(pages, np.uint8, count, shift).view(dtype).reshape(shape)
            yield array
            del array
        finally:
            # An array that outlives the block keeps the pages; they go when it does.
            with suppress(BufferError):
                pages.close()

    def _map(self, begin: int, count: int, *, whole: bool) -> mmap.mmap | None:
        flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if whole else 0)
        try:
            return mmap.mmap(self._descriptor, count, flags, mmap.PROT_READ, offset=begin)
        except OSError:  # a file system that cannot map
            return None

    def read(self, info: TensorInfo, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its first axis, as an array of its storage dtype."""
        dtype = info.dtype.numpy
        shape = info.shape
        begin = info.begin
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            begin += start * (info.nbytes // shape[0])
            shape = (stop - start, *shape[1:])
        array = np.empty(shape, dtype)
        if array.nbytes:
            self.read_into(array.reshape(-1), begin)
        return array

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file, up to its data.

    Args:
        tensors: (name, dtype code, shape, number of bytes) in the order of the data.
        metadata: strings to keep in the header.

    Example:
        >>> header_bytes([("w", "F32", (2,), 8)], {})[8:].decode().strip()
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, code, shape, nbytes in tensors:
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text


def save_file(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write NumPy (and ml_dtypes) arrays to a new safetensors file, made durable and then named: never half a file."""
    codes = {name: code_of(array.dtype) for name, array in tensors.items()}
    # Wide dtypes first, as the safetensors library orders them: every tensor stays aligned to its own size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    head = header_bytes(
        [(name, codes[name], tensors[name].shape, tensors[name].nbytes) for name in names], metadata or {"format": "pt"}
    )
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(head)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
