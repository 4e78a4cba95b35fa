"""Progress on standard error: a bar with bytes per second and the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["byte_progress"]

_SECONDS = 10.0


@contextmanager
def byte_progress(title: str, total: Callable[[], int]) -> Iterator[Callable[[int, str], None]]:
    """A function to call with (bytes done, name); `total()` is asked at the first call."""
    if sys.stderr.isatty():
        with _bar(title, total) as advance:
            yield advance
        return
    started = last = time.monotonic()
    done = 0
    lock = threading.Lock()

    def advance_lines(count: int, name: str) -> None:
        nonlocal done, last
        with lock:
            done += count
            now = time.monotonic()
            if now - last < _SECONDS:
                return
            last = now
            rate = done / (now - started)
            left = (total() - done) / rate if rate else 0
            line = (
                f"{title}: {done / 1e9:.1f} of {total() / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left "
                f"({name})"
            )
            print(line, file=sys.stderr, flush=True)

    yield advance_lines


@contextmanager
def _bar(title: str, total: Callable[[], int]) -> Iterator[Callable[[int, str], None]]:
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

        def advance(count: int, name: str) -> None:
            progress.update(task, advance=count, total=total(), description=f"{title} {name[-40:]:<40}")

        yield advance
