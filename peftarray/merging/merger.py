"""`merge`: an adapter, or several, into a base checkpoint of any size, without the model."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.dtypes import decode, parse_dtype, storage_dtype
from peftarray.errors import (
    ConfigError,
    FormatError,
    MatchError,
    NumberError,
    OutputError,
    QualityError,
    UnsupportedError,
)
from peftarray.formats import peft
from peftarray.formats.adapters import Adapters
from peftarray.formats.folder import check_new, usable_name
from peftarray.merging.execute import Progress, execute, planned_memory
from peftarray.merging.journal import JOURNAL, Journal, read_journal, sync_folder
from peftarray.merging.placement import placement
from peftarray.merging.plan import Plan, make_plan
from peftarray.merging.report import MergeReport
from peftarray.merging.side_files import side_bytes, write_side_files
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["PathLike", "merge", "open_inputs", "parse_size"]

PathLike = str | os.PathLike[str]
_MOST_THREADS = 1024
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def merge(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    scale: float | Sequence[float] = 1.0,
    dtype: str | None = None,
    dry_run: bool = False,
    threads: int | None = None,
    backend: str = "numpy",
    device: str | None = None,
    verify: bool = False,
    fail_if_retained_below: float | None = None,
    allow_unmatched: bool = False,
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a base checkpoint: W' = W + sum scale (F(W) - W), F(W) an adapter's effective weight.

    Everything is checked from headers before a byte is written. The work streams: memory does not grow with the model.
    It is written to `OUT.partial` and renamed at the end; after a kill, the same call goes on where it stopped.

    Args:
        base: a folder with `config.json` and safetensors weights, or one `.safetensors` file.
        adapters: a folder that PEFT's `save_pretrained` wrote, or several.
        out: the folder to write; it must not exist.
        scale: a factor for the update of every adapter, or one for each.
        dtype: write all floating tensors in this dtype; None keeps each tensor's own.
        dry_run: plan and check, and write nothing.
        threads: how many work at once; None for one a core.
        backend: the array library that computes the updates: `"numpy"`, `"torch"`, `"jax"`, `"cupy"` or one that
            another package brings. Reading, rounding and writing are the host's.
        device: where, as that library names its devices (`"cuda:0"`); None for its own choice.
        verify: recompute everything in float64 afterwards, before `out` gets its name.
        fail_if_retained_below: raise if the output holds less of the update's energy than this share.
        allow_unmatched: pass over adapter tensors, targets and configuration fields without a counterpart.
        max_shard_size: split the result anew, in files of at most so many bytes (`"5GB"`); None keeps the base's files.
        progress: called with (bytes done, name) as the work goes on.

    Returns:
        What was done, with the figures of every changed tensor.

    Raises:
        PeftError: of the kind that fits; nothing stands at `out` then.
    """
    started = time.perf_counter()
    target = Path(out).absolute()
    workers = _workers(threads)
    if fail_if_retained_below is not None and not 0 <= fail_if_retained_below <= 1:
        message = f"fail_if_retained_below is {fail_if_retained_below}; it is a share, from 0 to 1"
        raise ConfigError(message)
    size = parse_size(max_shard_size) if max_shard_size is not None else None
    kind = parse_dtype(dtype) if dtype is not None else None
    place = placement(backend, device)
    source, pairs = open_inputs(base, adapters, scale, allow_unmatched=allow_unmatched)
    finished = _check_place(target, [source.path, *(Path(adapter.name) for adapter, _ in pairs)], dry_run=dry_run)
    plan = make_plan(source, pairs, dtype=kind, max_shard_size=size, place=place.name)
    for adapter, _ in pairs:
        _check_numbers(adapter)
    report = _planned(plan, target, workers, dry_run=dry_run)
    idle = tuple(f"{adapter.name} has the scale 0 and changes nothing" for adapter, weight in pairs if not weight)
    report = replace(report, notes=(*report.notes, *idle))
    if dry_run:
        return replace(report, seconds=time.perf_counter() - started)
    partial = _partial(target)
    with _disk_errors(partial):
        if finished:
            _adopt(target, partial, plan)
        _check_space(plan, target, partial)
        journal = Journal(partial, plan.fingerprint)
        try:
            resumed = len(journal.finished)
            tensors = execute(
                plan, journal, threads=workers, progress=progress or (lambda count, name: None), place=place
            )
            notes = write_side_files(plan, partial)
            report = replace(report, tensors=tensors, notes=(*report.notes, *notes), resumed=resumed)
            if verify:
                _verify(plan, partial)
            _check_quality(report, fail_if_retained_below, partial)
            _give_name(partial, target)
        except (ConfigError, MatchError, NumberError, UnsupportedError):
            journal.discard()  # the same inputs would fail again
            raise
        finally:
            journal.close()
    return replace(report, seconds=time.perf_counter() - started)


def open_inputs(
    base: PathLike, adapters: PathLike | Sequence[PathLike], scale: float | Sequence[float], *, allow_unmatched: bool
) -> tuple[Checkpoint, list[tuple[Adapters, float]]]:
    """The base, and each adapter read against it with its factor."""
    paths = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    if not paths:
        message = "no adapter was given; give at least one folder"
        raise ConfigError(message)
    given: Any = scale  # whatever a caller passed
    try:
        scales = [float(value) for value in ([given] * len(paths) if isinstance(given, Real) else list(given))]
    except (TypeError, ValueError, OverflowError):
        scales = []
    if isinstance(given, str) or len(scales) != len(paths) or not np.isfinite(scales).all():
        message = f"scale is {scale!r} for {len(paths)} adapters; give one finite number, or one for each"
        raise ConfigError(message)
    try:
        source = Checkpoint.open(Path(base))
        if source.path.is_dir() and (source.path / JOURNAL).is_file():
            message = f"{base} is the result of a merge that did not finish; run that merge again to finish it"
            raise FormatError(message)
        found = [peft.read(Path(path), source, allow_unmatched=allow_unmatched) for path in paths]
    except OSError as error:
        message = f"{error.filename} cannot be read ({error.strerror}); check the path and its permissions"
        raise FormatError(message) from None
    return source, list(zip(found, scales, strict=True))


def parse_size(size: int | str) -> int:
    """A number of bytes from `"500MB"`, `"5GB"` or a plain number.

    Example:
        >>> parse_size("5GB")
        5000000000
    """
    text = str(size).strip().upper()
    digits = text.rstrip("KMGTB")
    try:
        value = float(digits) * _UNITS[text[len(digits) :]]
        if value < 1 or value != value:
            raise ValueError
        return int(value)
    except (KeyError, ValueError, OverflowError):
        message = f"max_shard_size is {size!r}; give a number of bytes of at least 1, or one with KB, MB, GB or TB"
        raise ConfigError(message) from None


def _workers(threads: int | None) -> int:
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


def _check_place(target: Path, inputs: list[Path], *, dry_run: bool) -> bool:
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
    needed = plan.nbytes + side_bytes(plan.base.path)
    if partial.is_dir():
        needed -= sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        message = (
            f"OUT {target} needs {needed / 1e9:.3g} GB more and {target.parent} has {free / 1e9:.3g} GB free; "
            "free space, or give another place"
        )
        raise OutputError(message)


def _check_numbers(adapter: Adapters) -> None:
    """Refuse NaN and infinity in any tensor that goes into the result, before anything is written."""
    unused = {*adapter.unused, *adapter.unmatched}
    factors = {ref.name for site in adapter.sites for ref in site.params.values()}
    for name, info in adapter.tensors.items():
        dtype = storage_dtype(info.code)
        floating = dtype is not None and dtype.floating
        if name in factors and not floating:
            message = f"{adapter.name}: {name} is stored as {info.code}; a method's tensors must be floating numbers"
            raise UnsupportedError(message)
        if name in unused or dtype is None or not floating or not info.nbytes:
            continue
        rows = info.shape[0] if info.shape else 1
        step = max(1, (4 << 20) * rows // info.nbytes)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows)) if info.shape else None
            values = decode(adapter.tensors.read_stored(name, part), dtype).reshape(-1)
            with np.errstate(over="ignore", invalid="ignore"):
                # A finite sum of squares needs finite terms; only an overflow is looked at closely.
                sound = np.isfinite(np.dot(values, values)) or np.isfinite(values).all()
            if not sound:
                bad = int((~np.isfinite(values)).sum())
                message = (
                    f"{adapter.name}: {name} holds {bad} NaN or infinite values (of {values.size} looked at); "
                    "such an adapter diverged in training: use an earlier checkpoint"
                )
                raise NumberError(message)


def _planned(plan: Plan, target: Path, threads: int, *, dry_run: bool) -> MergeReport:
    adapters = [adapter for adapter, _ in plan.adapters]
    given = sum(len(adapter.tensors) - len(adapter.unused) for adapter in adapters)
    missed = {name for adapter in adapters for name in adapter.unmatched}
    return MergeReport(
        out=str(target),
        tensors=(),
        applied=given - sum(name in adapter.tensors for adapter in adapters for name in missed),
        given=given,
        copied=sum(output.is_copy for output in plan.outputs),
        nbytes=plan.nbytes,
        seconds=0.0,
        memory=planned_memory(plan, threads),
        notes=tuple(note for adapter in adapters for note in adapter.notes),
        unmatched=tuple(sorted(missed)),
        dry_run=dry_run,
    )


def _verify(plan: Plan, folder: Path) -> None:
    from peftarray.merging.verification import verify_plan

    checked = verify_plan(plan, Checkpoint.open(folder), rows=None)
    if not checked.passed:
        message = f"the merge in {folder} does not hold up: {checked.failures[0]}"
        raise QualityError(message)


def _check_quality(report: MergeReport, least: float | None, partial: Path) -> None:
    if least is not None and report.retained < least:
        worst = (
            f"; the worst tensor is {report.flagged[0].name} with {report.flagged[0].retained:.3f}"
            if report.flagged
            else ""
        )
        message = (
            f"the output holds {report.retained:.4f} of the update's energy, and at least {least:g} was asked "
            f"for{worst}; write a wider dtype (--dtype float32), or run again without the gate: the finished work "
            f"is kept in {partial}"
        )
        raise QualityError(message)
