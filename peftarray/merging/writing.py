"""Carry out a plan at a place: into `OUT.partial`, resumed after a kill, named OUT once all is done."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from peftarray.errors import ConfigError, MatchError, NumberError, OutputError, UnsupportedError
from peftarray.formats.folder import check_new, usable_name
from peftarray.merging.execute import Progress, execute
from peftarray.merging.journal import JOURNAL, Journal, read_journal, sync_folder
from peftarray.merging.placement import HOST, Placement
from peftarray.merging.plan import Plan
from peftarray.merging.report import TensorReport
from peftarray.merging.side_files import side_bytes

__all__ = ["check_place", "worker_count", "write_plan"]

_MOST_THREADS = 1024
_Done = TypeVar("_Done")


def write_plan(
    plan: Plan,
    target: Path,
    finish: Callable[[tuple[TensorReport, ...], Path, int], _Done],
    *,
    threads: int,
    progress: Progress | None,
    place: Placement = HOST,
    adopt: bool = False,
) -> _Done:
    """Write what a plan says, and give it its name.

    Args:
        plan: what to write.
        target: OUT.
        finish: called with the figures of every changed tensor, the folder, and how many shards an earlier run had
            finished, before OUT gets its name; what it raises leaves the folder as it is.
        threads: how many work at once.
        progress: told of every piece of work.
        place: where updates are computed.
        adopt: whether OUT is a finished result that only lacks its last step.

    Returns:
        What `finish` returned.
    """
    partial = _partial(target)
    with _disk_errors(partial):
        if adopt:
            _adopt(target, partial, plan)
        _check_space(plan, target, partial)
        journal = Journal(partial, plan.fingerprint)
        try:
            resumed = len(journal.finished)
            tensors = execute(
                plan, journal, threads=threads, progress=progress or (lambda count, name: None), place=place
            )
            done = finish(tensors, partial, resumed)
            _give_name(partial, target)
        except (ConfigError, MatchError, NumberError, UnsupportedError):
            journal.discard()  # the same inputs would fail again
            raise
        finally:
            journal.close()
    return done


def worker_count(threads: int | None) -> int:
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        message = f"threads is {threads}; it must be at least 1 and at most {_MOST_THREADS}"
        raise ConfigError(message)
    return threads or len(os.sched_getaffinity(0))


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the place and its permissions"
        message = f"{place} cannot be written ({error.strerror}); {what}, and run the same command again"
        raise OutputError(message) from None


def check_place(target: Path, inputs: list[Path], *, dry_run: bool) -> bool:
    """Whether OUT is a finished merge that only lacks its last step; every other OUT that exists is refused."""
    with usable_name(target):
        return _is_finished(target, inputs, dry_run=dry_run)


def _is_finished(target: Path, inputs: list[Path], *, dry_run: bool) -> bool:
    places = [target.resolve(), _partial(target).resolve()] if target.name else [target]
    for path in inputs:
        for place in places:
            if place == path.resolve() or path.resolve() in place.parents:
                message = f"OUT {target}: {place} is, or lies in, the input {path}; give another folder"
                raise OutputError(message)
    if (target / JOURNAL).is_file():
        return True
    check_new(target, written=not dry_run)
    return False


def _adopt(target: Path, partial: Path, plan: Plan) -> None:
    """Take back a result that a kill caught between its renaming and its last step."""
    kept = read_journal(target)
    if kept is None or kept["fingerprint"] != plan.fingerprint or partial.exists():
        message = f"OUT {target} exists, the result of another merge; give a new folder, or remove it first"
        raise OutputError(message)
    Journal(target, plan.fingerprint).close()  # raises while another process takes the last step
    target.rename(partial)


def _give_name(partial: Path, target: Path) -> None:
    """The last step: from here on the result stands at OUT."""
    sync_folder(partial)
    if target.exists() or target.is_symlink():
        message = f"{target} came into being during the merge; the result is in {partial}: rename it yourself"
        raise OutputError(message)
    partial.rename(target)
    sync_folder(target.parent)
    (target / JOURNAL).unlink()


def _check_space(plan: Plan, target: Path, partial: Path) -> None:
    needed = plan.nbytes + side_bytes(plan.base.files.path)
    if partial.is_dir():
        needed -= sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        message = (
            f"OUT {target} needs {needed / 1e9:.3g} GB more and {target.parent} has {free / 1e9:.3g} GB free; "
            "free space, or give another place"
        )
        raise OutputError(message)
