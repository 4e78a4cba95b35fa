"""Carry out a plan: tasks of a few megabytes over threads, each byte written once, in memory that stays the same."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from peftarray.dtypes import decode, dtype_name, encode
from peftarray.errors import OutputError
from peftarray.merging.journal import Journal
from peftarray.merging.plan import Output, Plan, Segment, Shard
from peftarray.merging.report import Sums, TensorReport, sums_from_dict, sums_to_dict
from peftarray.merging.tile import Scratch, SegmentMerger, can_tile
from peftarray.stores.safetensors import SafetensorsFile

__all__ = ["Progress", "execute", "planned_memory"]

Progress = Callable[[int, str], None]
"""Called with bytes done since the last call, and the name of what they belong to."""

_TILE = 1 << 19
"""Entries a tile: 2 MB of float32. Smaller ones fit a core's own cache, but then threads wait for each other: NumPy
takes the interpreter's lock again after every operation, and one on a large tile is long enough to hide that."""
_TASK = 1 << 23
"""Bytes of output a task."""
_EXACT, _SAMPLE = 1 << 20, 4
"""Tensors up to so many entries are measured whole; of larger ones, one tile in so many."""
_COPY = 1 << 26
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class _Target:
    """An open output shard."""

    path: Path
    descriptor: int
    reports: dict[str, Sums]
    lock: threading.Lock


def execute(plan: Plan, journal: Journal, *, threads: int, progress: Progress) -> tuple[TensorReport, ...]:
    """Write every shard of a plan that the journal does not have yet.

    Args:
        plan: what to write.
        journal: where, and what is done already.
        threads: how many work at once; BLAS gets one thread in each.
        progress: told of every piece of work.

    Returns:
        The figures of every changed tensor, those of earlier runs included.

    Raises:
        OutputError: the disk is full or fails; finished shards are kept.
    """
    local = threading.local()
    with (
        threadpool_limits(1),
        ThreadPoolExecutor(threads, "merge") as workers,
        ThreadPoolExecutor(1, "sync") as syncer,
    ):
        syncs: list[Future[None]] = []
        try:
            for shard in plan.shards:
                if _is_finished(shard, journal):
                    progress(shard.nbytes, shard.name)
                    continue
                target = _open(journal.folder / shard.name, shard)
                try:
                    _run(_tasks(shard, target, local, progress), workers, threads)
                except BaseException:
                    os.close(target.descriptor)
                    target.path.unlink(missing_ok=True)
                    raise
                syncs.append(syncer.submit(_finish, shard, target, journal))
        finally:
            # A shard that is whole is worth keeping even when a later one failed.
            for sync in syncs:
                sync.exception()
        for sync in syncs:
            sync.result()
    return tuple(
        TensorReport(name, dtype_name(values["dtype"]), sums_from_dict(values["sums"]))
        for shard in plan.shards
        for name, values in journal.finished[shard.name].items()
    )


def _is_finished(shard: Shard, journal: Journal) -> bool:
    path = journal.folder / shard.name
    return shard.name in journal.finished and path.is_file() and path.stat().st_size == shard.nbytes


def _open(path: Path, shard: Shard) -> _Target:
    with _disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _write_all(descriptor, memoryview(shard.header), 0, path)
            os.ftruncate(descriptor, shard.nbytes)
        except BaseException:
            os.close(descriptor)
            raise
    return _Target(path, descriptor, {}, threading.Lock())


def _finish(shard: Shard, target: _Target, journal: Journal) -> None:
    with _disk_errors(target.path):
        try:
            os.fsync(target.descriptor)
        finally:
            os.close(target.descriptor)
        codes = {output.name: output.code for output in shard.outputs}
        order = [output.name for output in shard.outputs if output.name in target.reports]
        found = {name: {"dtype": codes[name], "sums": sums_to_dict(target.reports[name])} for name in order}
        journal.record(shard.name, found)


def _run(tasks: Iterator[Callable[[], None]], workers: ThreadPoolExecutor, threads: int) -> None:
    """Run tasks with a short queue, so that no more is prepared ahead than the threads can work on."""
    pending: set[Future[None]] = set()
    try:
        for task in tasks:
            pending.add(workers.submit(task))
            if len(pending) >= 2 * threads:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        for future in pending:
            future.result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def _tasks(shard: Shard, target: _Target, local: threading.local, progress: Progress) -> Iterator[Callable[[], None]]:
    run: list[Output] = []
    for output in shard.outputs:
        if output.is_copy and (not run or _adjoins(run[-1], output)):
            run.append(output)
            continue
        yield from _copies(run, target, progress)
        run = []
        if output.is_copy:
            run = [output]
        else:
            yield from _merges(output, target, local, progress)
    yield from _copies(run, target, progress)


def _adjoins(before: Output, after: Output) -> bool:
    return before.source is after.source and before.info.end == after.info.begin and before.end == after.begin


def _copies(run: list[Output], target: _Target, progress: Progress) -> Iterator[Callable[[], None]]:
    if not run:
        return
    source, begin, end = run[0].source, run[0].info.begin, run[-1].info.end
    shift = run[0].begin - begin
    for start in range(begin, end, _COPY):
        stop = min(start + _COPY, end)

        def task(start: int = start, stop: int = stop) -> None:
            _copy_range(source, target, start, start + shift, stop - start)
            progress(stop - start, run[0].name)

        yield task


def _copy_range(source: SafetensorsFile, target: _Target, begin: int, at: int, count: int) -> None:
    """Bytes from file to file inside the kernel; through memory where the file systems cannot."""
    with _disk_errors(target.path):
        done = 0
        while done < count:
            try:
                moved = os.copy_file_range(source.descriptor, target.descriptor, count - done, begin + done, at + done)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                moved = 0
            if not moved:
                break
            done += moved
        buffer = bytearray(min(1 << 20, count - done))
        while done < count:
            part = memoryview(buffer)[: count - done]
            source.read_into(part, begin + done)
            _write_all(target.descriptor, part, at + done, target.path)
            done += len(part)


def _merges(
    output: Output, target: _Target, local: threading.local, progress: Progress
) -> Iterator[Callable[[], None]]:
    if output.segments:
        # A tensor without entries has no task, and still has its line in the report.
        target.reports.setdefault(output.name, Sums())
    rows_done = 0
    for segment in output.segments or (Segment(0, _rows(output), ()),):
        rows_done = segment.end
        whole = not can_tile(segment)
        merger = SegmentMerger(output, segment) if segment.contributions else None
        step = _tile_rows(output, merger, whole, segment)
        rows = max(step, _TASK // max(1, output.columns * output.dtype.bits // 8) // step * step)
        for begin in range(segment.begin, segment.end, segment.end - segment.begin if whole else rows):
            end = segment.end if whole else min(begin + rows, segment.end)

            def task(
                begin: int = begin, end: int = end, merger: SegmentMerger | None = merger, step: int = step
            ) -> None:
                _merge_rows(output, merger, begin, end, step, target, local)
                progress((end - begin) * output.columns * output.dtype.bits // 8, output.name)

            yield task
    assert rows_done == _rows(output)


def _rows(output: Output) -> int:
    count = output.nbytes * 8 // output.dtype.bits
    return count // output.columns if output.columns else 0


def _tile_rows(output: Output, merger: SegmentMerger | None, whole: bool, segment: Segment) -> int:
    if whole:
        return max(1, segment.end - segment.begin)
    step = merger.row_step() if merger is not None else 1
    return max(1, _TILE // max(1, output.columns) // step) * step


@np.errstate(all="ignore")  # what is not finite is found in the result
def _merge_rows(
    output: Output,
    merger: SegmentMerger | None,
    begin: int,
    end: int,
    step: int,
    target: _Target,
    local: threading.local,
) -> None:
    scratch = local.__dict__.setdefault("scratch", Scratch())
    total = Sums()
    width = output.columns * output.dtype.bits // 8
    # Of a large tensor one tile in four that the update reaches is measured, the first of each task among them.
    often = _SAMPLE if math.prod(output.shape) > _EXACT else 1
    reached = 0
    source = output.info.dtype.numpy
    assert source is not None  # `TensorInfo.dtype` raises for dtypes without one
    at = output.info.begin + begin * output.columns * source.itemsize
    with output.source.window(at, (end - begin, output.columns), source) as rows:
        for first in range(0, end - begin, step):
            stored = rows[first : first + step]
            rounded = scratch.array("rounded", stored.shape, output.dtype.numpy)
            if merger is None:
                _convert(output, stored, rounded, scratch)
            else:
                sums = merger.merge(stored, begin + first, rounded, scratch, measure=reached % often == 0)
                reached += sums.update != 0
                total.add(sums)
            data = memoryview(rounded.reshape(-1).view("u1"))
            _write_all(target.descriptor, data, output.begin + (begin + first) * width, target.path)
            del stored
    # Lets the disk begin now, so that little is left to wait for when the shard is synced.
    os.posix_fadvise(target.descriptor, output.begin + begin * width, (end - begin) * width, os.POSIX_FADV_DONTNEED)
    if merger is not None and merger.segment.contributions:
        with target.lock:
            target.reports.setdefault(output.name, Sums()).add(total)


def _convert(output: Output, stored: np.ndarray, rounded: np.ndarray, scratch: Scratch) -> None:
    """Rows whose values stay: copied, or rounded to another dtype."""
    source = output.info.dtype
    if source.code == output.code:
        rounded[...] = stored
        return
    encode(decode(stored, source, scratch.array("base", stored.shape, source.compute)), output.dtype, rounded)


def _write_all(descriptor: int, data: memoryview, at: int, path: Path) -> None:
    with _disk_errors(path):
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], at + done)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            message = (
                f"no space left while writing {path}; finished shards are kept in {path.parent}: free space and "
                "run the same command again, or remove that folder"
            )
        else:
            message = f"{path} cannot be written ({error.strerror}); check the disk and its permissions"
        raise OutputError(message) from None


def planned_memory(plan: Plan, threads: int) -> int:
    """Bytes that the work holds at once, at most: tiles of every thread, or the largest tensor that cannot be cut."""
    tiles = threads * _TILE * (4 * 4 + 2 * 2)
    largest = 0
    for output in plan.outputs:
        for segment in output.segments:
            entries = (segment.end - segment.begin) * output.columns
            if not can_tile(segment):
                largest = max(largest, entries * 20)
            params = sum(
                contribution.adapters.tensors[ref.name].nbytes
                for contribution in segment.contributions
                for part in contribution.parts
                for ref in part.site.params.values()
            )
            largest = max(largest, 2 * params)
    return tiles + threads * largest
