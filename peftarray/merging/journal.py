"""What a merge has finished, kept beside the unfinished result, so that the same command goes on after a kill.

`OUT.partial/` holds shards and the journal. A shard enters the journal once it is on the disk. The folder is renamed
to OUT when all is done, and the journal removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from peftarray.errors import FormatError, OutputError
from peftarray.stores.json_file import read_json

__all__ = ["JOURNAL", "Journal", "read_journal", "sync_folder", "write_durably"]

JOURNAL = ".peftarray-merge.json"
_NEW = ".new"


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
        folder.mkdir(exist_ok=True)
        # Not through a link: the folder is renamed in the end, and its files are overwritten.
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"another process is writing {folder}; wait for it, or give another OUT"
                raise OutputError(message) from None
            # A kill may leave a folder whose journal was about to be named.
            if {file.name for file in folder.iterdir()} <= {JOURNAL + _NEW}:
                self._write()
            else:
                self._resume()
        except BaseException:
            self.close()
            raise

    def _resume(self) -> None:
        kept = read_journal(self.folder)
        if kept is None or kept["fingerprint"] != self.fingerprint:
            what = "a merge with other inputs or options" if kept else "something other than an unfinished merge"
            message = f"{self.folder} holds {what}; finish that one, remove the folder, or give another OUT"
            raise OutputError(message)
        self.finished = kept["finished"]

    def record(self, shard: str, found: Any) -> None:
        """Note a shard that is whole and on the disk."""
        self.finished[shard] = found
        self._write()

    def _write(self) -> None:
        text = json.dumps({"fingerprint": self.fingerprint, "finished": self.finished})
        write_durably(self.folder / JOURNAL, text.encode())

    def discard(self) -> None:
        """Remove the folder: what it holds can never be finished."""
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def read_journal(folder: Path) -> dict[str, Any] | None:
    """What the journal in a folder says: `fingerprint` and `finished`; None where there is none, or not a whole one."""
    try:
        kept = read_json(folder / JOURNAL)
    except FormatError:
        return None
    sound = isinstance(kept.get("fingerprint"), str) and isinstance(kept.get("finished"), dict)
    return kept if sound else None


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, also after a power cut."""
    partial = path.with_name(path.name + _NEW)
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
