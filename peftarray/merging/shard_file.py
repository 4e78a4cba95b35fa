"""An output shard while it is written: bytes at known places, from several threads."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from peftarray.errors import OutputError
from peftarray.merging.report import Sums
from peftarray.stores.safetensors import SafetensorsFile

__all__ = ["ShardFile"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ELSEWHERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class ShardFile:
    """A file of known size, open for writing by several threads.

    Args:
        path: of the file, which is made anew.
        nbytes: its size.
        header: its first bytes.

    Attributes:
        reports: name of a tensor -> what merging it did.
        lock: for `reports`.
    """

    def __init__(self, path: Path, nbytes: int, header: bytes) -> None:
        self.path = path
        self.reports: dict[str, Sums] = {}
        self.lock = threading.Lock()
        with self._disk_errors():
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                self._write(memoryview(header), 0)
                os.ftruncate(self._descriptor, nbytes)
            except BaseException:
                self.close()
                raise

    def write(self, data: memoryview, at: int) -> None:
        """Write bytes at a place.

        Raises:
            OutputError: the disk is full, or fails.
        """
        with self._disk_errors():
            self._write(data, at)

    def copy(self, source: SafetensorsFile, begin: int, at: int, count: int) -> None:
        """Bytes of another file from `begin` on, inside the kernel; through memory where the file systems cannot.

        Raises:
            OutputError: the disk is full, or fails.
        """
        with self._disk_errors():
            done = 0
            while done < count:
                try:
                    moved = os.copy_file_range(
                        source.descriptor, self._descriptor, count - done, begin + done, at + done
                    )
                except OSError as error:
                    if error.errno not in _ELSEWHERE:
                        raise
                    moved = 0
                if not moved:
                    break
                done += moved
            buffer = bytearray(min(1 << 20, count - done))
            while done < count:
                part = memoryview(buffer)[: count - done]
                source.read_into(part, begin + done)
                self._write(part, at + done)
                done += len(part)

    def begin_writing_back(self, at: int, count: int) -> None:
        """Let the disk begin with these bytes, so that little is left to wait for when the file is synced."""
        os.posix_fadvise(self._descriptor, at, count, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Close the file when all of it is on the disk.

        Raises:
            OutputError: the disk is full, or fails.
        """
        with self._disk_errors():
            try:
                os.fsync(self._descriptor)
            finally:
                self.close()

    def close(self) -> None:
        """Close the file, whatever is in it."""
        os.close(self._descriptor)

    def _write(self, data: memoryview, at: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], at + done)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                message = (
                    f"no space left while writing {self.path}; finished shards are kept in {self.path.parent}: free "
                    "space and run the same command again, or remove that folder"
                )
            else:
                message = f"{self.path} cannot be written ({error.strerror}); check the disk and its permissions"
            raise OutputError(message) from None
