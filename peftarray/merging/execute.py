"""Carry out a plan: tasks of a few megabytes over threads, each byte written once, in memory that stays the same."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait

import numpy as np
from threadpoolctl import threadpool_limits

from peftarray.dtypes import decode, dtype_name, encode
from peftarray.merging.contributions import Segment
from peftarray.merging.encoded import Encoded
from peftarray.merging.encoding import write_encoded
from peftarray.merging.journal import Journal
from peftarray.merging.origin import StoredOrigin
from peftarray.merging.placement import HOST, Placement
from peftarray.merging.plan import Output, Plan, Shard
from peftarray.merging.report import Sums, TensorReport, sums_from_dict, sums_to_dict
from peftarray.merging.shard_file import ShardFile
from peftarray.merging.tile import TILE, Scratch, SegmentMerger, can_tile, rows_in

__all__ = ["Progress", "execute", "planned_memory"]

Progress = Callable[[int, str], None]
"""Called with bytes done since the last call, and the name of what they belong to."""
_Task = Callable[[Scratch], None]

_TASK = 1 << 23
"""Bytes of output a task."""
_COPY = 1 << 26


class _Work:
    """The tasks of one open shard, and how many workers are at them."""

    def __init__(self, shard: Shard, target: ShardFile, tasks: Iterator[_Task]) -> None:
        self.shard, self.target = shard, target
        self.active, self.drained = 0, False
        self._tasks, self._lock = tasks, threading.Lock()

    def next(self) -> _Task | None:
        with self._lock:  # making a task may prepare a method's arrays; other shards need not wait for that
            return next(self._tasks, None)


class _Queue:
    """Shards for workers, each as far as it can at a file of its own: the kernel lets one writer at a time into each.

    Args:
        waiting: the shards to write.
        journal: where, and where they are recorded.
        syncer: a thread that waits for the disk, so that no worker has to.
        progress: told of every piece of work.
        place: where the updates are computed.
        most_open: how many files may be open at once.
    """

    def __init__(
        self,
        waiting: list[Shard],
        journal: Journal,
        syncer: ThreadPoolExecutor,
        progress: Progress,
        place: Placement,
        *,
        most_open: int,
    ) -> None:
        self._waiting = list(reversed(waiting))
        self._open: list[_Work] = []
        self._syncs: list[Future[None]] = []
        self._journal, self._syncer, self._progress, self._most_open = journal, syncer, progress, most_open
        self._place = place
        self._lock = threading.Lock()
        self._stopped = False

    @np.errstate(all="ignore")  # what is not finite is found in the result
    def work(self) -> None:
        """Carry out tasks until there are none; what a worker runs."""
        scratch = Scratch()
        work = self._join()
        while work is not None:
            try:
                task = work.next()
                if task is not None:
                    task(scratch)
            except BaseException:
                self.stop()
                raise
            self._leave(work, drained=task is None)
            work = self._join()

    def stop(self) -> None:
        """Let every worker end after its task."""
        self._stopped = True

    def discard(self) -> None:
        """Remove the shards that are not whole."""
        for work in self._open:
            work.target.close()
            work.target.path.unlink(missing_ok=True)
        # A shard that is whole is worth keeping even when another one failed.
        wait(self._syncs)

    def finish(self) -> None:
        """Wait until every shard is on the disk."""
        for sync in self._syncs:
            sync.result()

    def _join(self) -> _Work | None:
        with self._lock:
            if self._stopped:
                return None
            works = [work for work in self._open if not work.drained]
            best = min(works, key=lambda work: work.active, default=None)
            if (best is None or best.active) and self._waiting and len(works) < self._most_open:
                shard = self._waiting.pop()
                target = ShardFile(self._journal.folder / shard.name, shard.nbytes, shard.header)
                best = _Work(shard, target, _tasks(shard, target, self._progress, self._place))
                self._open.append(best)
            if best is not None:
                best.active += 1
            return best

    def _leave(self, work: _Work, *, drained: bool) -> None:
        with self._lock:
            work.active -= 1
            work.drained |= drained
            if work.drained and not work.active:
                self._open.remove(work)
                self._syncs.append(self._syncer.submit(_finish, work.shard, work.target, self._journal))


def execute(
    plan: Plan, journal: Journal, *, threads: int, progress: Progress, place: Placement = HOST
) -> tuple[TensorReport, ...]:
    """Write every shard of a plan that the journal does not have yet.

    Args:
        plan: what to write.
        journal: where, and what is done already.
        threads: how many work at once; BLAS gets one thread in each.
        progress: told of every piece of work.
        place: where the updates are computed.

    Returns:
        The figures of every changed tensor, those of earlier runs included.

    Raises:
        OutputError: the disk is full or fails; finished shards are kept.
    """
    waiting = []
    for shard in plan.shards:
        if _is_finished(shard, journal):
            progress(shard.nbytes, shard.name)
        else:
            waiting.append(shard)
    with (
        threadpool_limits(1),
        ThreadPoolExecutor(threads, "merge") as workers,
        ThreadPoolExecutor(1, "sync") as syncer,
    ):
        queue = _Queue(waiting, journal, syncer, progress, place, most_open=threads)
        running = [workers.submit(queue.work) for _ in range(threads)]
        try:
            for future in as_completed(running):
                future.result()
        finally:
            queue.stop()
            wait(running)
            queue.discard()
        queue.finish()
    return tuple(
        TensorReport(name, dtype_name(values["dtype"]), sums_from_dict(values["sums"]))
        for shard in plan.shards
        for name, values in journal.finished[shard.name].items()
    )


def _is_finished(shard: Shard, journal: Journal) -> bool:
    path = journal.folder / shard.name
    return shard.name in journal.finished and path.is_file() and path.stat().st_size == shard.nbytes


def _finish(shard: Shard, target: ShardFile, journal: Journal) -> None:
    target.sync()
    codes = {item.name: item.weight.codec.kind if isinstance(item, Encoded) else item.info.code for item in shard.items}
    order = [item.name for item in shard.items if item.name in target.reports]
    found = {name: {"dtype": codes[name], "sums": sums_to_dict(target.reports[name])} for name in order}
    journal.record(shard.name, found)


def _tasks(shard: Shard, target: ShardFile, progress: Progress, place: Placement) -> Iterator[_Task]:
    run: list[Output] = []
    for item in shard.items:
        if isinstance(item, Output) and item.is_copy and (not run or _adjoins(run[-1], item)):
            run.append(item)
            continue
        yield from _copies(run, target, progress)
        run = []
        if isinstance(item, Encoded):
            yield _encodes(item, target, progress, place)
        elif item.is_copy:
            run = [item]
        else:
            yield from _merges(item, target, progress, place)
    yield from _copies(run, target, progress)


def _copied_from(output: Output) -> StoredOrigin:
    assert isinstance(output.origin, StoredOrigin)  # it `is_copy`
    return output.origin


def _adjoins(before: Output, after: Output) -> bool:
    first, second = _copied_from(before), _copied_from(after)
    return first.file is second.file and first.info.end == second.info.begin and before.info.end == after.info.begin


def _copies(run: list[Output], target: ShardFile, progress: Progress) -> Iterator[_Task]:
    if not run:
        return
    source, begin, end = _copied_from(run[0]).file, _copied_from(run[0]).info.begin, _copied_from(run[-1]).info.end
    shift = run[0].info.begin - begin
    for start in range(begin, end, _COPY):
        stop = min(start + _COPY, end)

        def task(scratch: Scratch, start: int = start, stop: int = stop) -> None:
            target.copy(source, start, start + shift, stop - start)
            progress(stop - start, run[0].name)

        yield task


def _encodes(encoded: Encoded, target: ShardFile, progress: Progress, place: Placement) -> _Task:
    def task(scratch: Scratch) -> None:
        sums = write_encoded(encoded, target, scratch, place)
        with target.lock:
            target.reports[encoded.name] = sums
        progress(encoded.nbytes, encoded.name)

    return task


def _merges(output: Output, target: ShardFile, progress: Progress, place: Placement) -> Iterator[_Task]:
    if output.segments:
        # A tensor without entries has no task, and still has its line in the report.
        target.reports.setdefault(output.name, Sums())
    rows_done = 0
    for segment in output.segments or (Segment(0, _rows(output), ()),):
        rows_done = segment.end
        whole = not can_tile(segment)
        merger = SegmentMerger(output, segment, place) if segment.contributions else None
        grain = merger.row_step() if merger is not None and not whole else 1
        step = max(1, segment.end - segment.begin) if whole else rows_in(TILE, output.columns, grain)
        # What is decoded as one block is not decoded by two tasks.
        block = math.lcm(grain, output.origin.row_step(output.columns))
        rows = rows_in(_TASK, output.columns * output.dtype.bits // 8, block)
        for begin in range(segment.begin, segment.end, segment.end - segment.begin if whole else rows):
            end = segment.end if whole else min(begin + rows, segment.end)

            def task(
                scratch: Scratch,
                begin: int = begin,
                end: int = end,
                merger: SegmentMerger | None = merger,
                step: int = step,
            ) -> None:
                _merge_rows(output, merger, begin, end, step, target, scratch)
                progress((end - begin) * output.columns * output.dtype.bits // 8, output.name)

            yield task
    assert rows_done == _rows(output)


def _rows(output: Output) -> int:
    count = output.info.nbytes * 8 // output.dtype.bits
    return count // output.columns if output.columns else 0


def _merge_rows(
    output: Output,
    merger: SegmentMerger | None,
    begin: int,
    end: int,
    step: int,
    target: ShardFile,
    scratch: Scratch,
) -> None:
    total = Sums()
    width = output.columns * output.dtype.bits // 8
    short = output.dtype.numpy
    assert short is not None
    with output.origin.rows(begin, end, output.columns) as take:
        for first in range(begin, end, step):
            stored = take(first, min(first + step, end))
            rounded = scratch.array("rounded", stored.shape, short)
            if merger is None:
                _convert(output, stored, rounded, scratch)
            else:
                total.add(merger.merge(stored, first, rounded, scratch))
            target.write(rounded.reshape(-1).view("u1").data, output.info.begin + first * width)
            del stored
        del take
    target.begin_writing_back(output.info.begin + begin * width, (end - begin) * width)
    if merger is not None and merger.segment.contributions:
        with target.lock:
            target.reports.setdefault(output.name, Sums()).add(total)


def _convert(output: Output, stored: np.ndarray, rounded: np.ndarray, scratch: Scratch) -> None:
    """Rows whose values stay: copied, or rounded to another dtype."""
    source = output.origin.dtype
    if source == output.dtype:
        rounded[...] = stored
    elif source.numpy == source.compute:
        encode(stored, output.dtype, rounded)
    else:
        encode(decode(stored, source, scratch.array("base", stored.shape, source.compute)), output.dtype, rounded)


def planned_memory(plan: Plan, threads: int) -> int:
    """Bytes that the work holds at once, at most: tiles of every thread, or the largest weight that cannot be cut."""
    tiles = threads * TILE * (4 * 4 + 2 * 2)
    largest = 0
    for encoded in plan.encoded:
        # The weight, its codes twice while they are joined, and what a tile needs.
        largest = max(largest, 4 * encoded.entries + 2 * encoded.nbytes + tiles // threads)
    for output in plan.outputs:
        decoded = min(output.origin.row_step(output.columns) * output.columns, math.prod(output.origin.shape))
        largest = max(largest, decoded * 8 if decoded > TILE else 0)
    for item in (item for shard in plan.shards for item in shard.items):
        for segment in item.segments:
            entries = (segment.end - segment.begin) * item.columns
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
