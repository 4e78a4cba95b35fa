"""What a merge has finished, kept beside the unfinished result, so that the same command goes on after a kill.

`OUT.partial/` holds shards and the journal. A shard enters the journal once it is on the disk. The folder is renamed
to OUT when all is done, and the journal removed.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from peftarray.errors import FormatError, OutputError
from peftarray.stores.json_file import read_json

__all__ = ["JOURNAL", "Journal", "sync_folder"]

JOURNAL = ".peftarray-merge.json"


class Journal:
    """The journal of one merge, locked against a second one.

    Attributes:
        folder: `OUT.partial`.
        finished: shard name -> what its work found, as plain values.

    Raises:
        OutputError: the folder holds another merge, or another process writes it now.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.finished: dict[str, Any] = {}
        self._lock = -1
        new = not folder.exists()
        folder.mkdir(exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another process is writing {folder}; wait for it, or give another OUT"
            raise OutputError(message) from None
        if new or not any(folder.iterdir()):
            self._write()
        else:
            self._resume()

    def _resume(self) -> None:
        try:
            kept = read_json(self.folder / JOURNAL)
        except FormatError:
            kept = {}
        if kept.get("fingerprint") != self.fingerprint:
            message = (
                f"{self.folder} holds the unfinished work of a merge with other inputs or options; finish that "
                "one, or remove the folder"
            )
            raise OutputError(message)
        self.finished = kept["finished"]

    def record(self, shard: str, found: Any) -> None:
        """Note a shard that is whole and on the disk."""
        self.finished[shard] = found
        self._write()

    def _write(self) -> None:
        text = json.dumps({"fingerprint": self.fingerprint, "finished": self.finished})
        write_durably(self.folder / JOURNAL, text.encode())

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, also after a power cut."""
    partial = path.with_name(path.name + ".new")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
