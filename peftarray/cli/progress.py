"""Progress on standard error: a bar with bytes per second and the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["byte_progress"]

_SECONDS = 10.0


class ByteProgress:
    """What a command tells about its work: bytes done, of how many.

    Attributes:
        total: bytes in all, once they are known.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.total = 0
        self._started = self._last = time.monotonic()
        self._done = 0
        self._lock = threading.Lock()

    def planned(self, total: int) -> None:
        """Take note of how many bytes there are in all."""
        self.total = total

    def advance(self, count: int, name: str) -> None:
        """Print a line now and then."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._last < _SECONDS:
                return
            self._last = now
            rate = self._done / (now - self._started)
            left = max(0, self.total - self._done) / rate if rate else 0
            line = (
                f"{self.title}: {self._done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, "
                f"{left:.0f} s left ({name})"
            )
            print(line, file=sys.stderr, flush=True)


class _Bar(ByteProgress):
    """The same as a bar on a terminal."""

    def __init__(self, title: str, update: Callable[[int, int, str], None]) -> None:
        super().__init__(title)
        self._update = update

    def advance(self, count: int, name: str) -> None:
        self._update(count, self.total, f"{self.title} {name[-40:]:<40}")


@contextmanager
def byte_progress(title: str) -> Iterator[ByteProgress]:
    """What a command calls as it works; a bar that goes away in the end, where there is a terminal."""
    if not sys.stderr.isatty():
        yield ByteProgress(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)

        def update(count: int, total: int, description: str) -> None:
            progress.update(task, advance=count, total=total, description=description)

        yield _Bar(title, update)
