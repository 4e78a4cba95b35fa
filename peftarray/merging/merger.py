"""`merge`: an adapter, or several, into a base checkpoint of any size, without the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from peftarray.dtypes import parse_dtype
from peftarray.errors import ConfigError, QualityError
from peftarray.formats.adapters import Adapters
from peftarray.merging.base import Base
from peftarray.merging.execute import Progress, planned_memory
from peftarray.merging.inputs import PathLike, check_numbers, open_inputs, parse_size
from peftarray.merging.merge_plan import make_plan
from peftarray.merging.placement import placement
from peftarray.merging.plan import Form, Plan
from peftarray.merging.report import LEAST_KEPT, MergeReport, TensorReport
from peftarray.merging.side_files import write_side_files
from peftarray.merging.writing import check_place, worker_count, write_plan
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["merge"]


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
    base_as: str | None = None,
    requantise: bool = False,
    keep_touched_in: str | None = None,
    allow_lost_updates: bool = False,
    planned: Callable[[int], None] | None = None,
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
        base_as: what a quantised base stands for: `"dequantised"`, its weights as they decode, or `"original=PATH"`,
            those of the checkpoint that it was quantised from.
        requantise: write the weights that are quantised in the base, and changed by an adapter, quantised as they were.
        keep_touched_in: write those in this dtype, and leave the others quantised.
        allow_lost_updates: write requantised weights even if they hold less than half of their update.
        planned: called once with the bytes that there are to write.
        progress: called with (bytes done, name) as the work goes on.

    Returns:
        What was done, with the figures of every changed tensor.

    Raises:
        PeftError: of the kind that fits; nothing stands at `out` then.
    """
    started = time.perf_counter()
    target = Path(out).absolute()
    workers = worker_count(threads)
    if fail_if_retained_below is not None and not 0 <= fail_if_retained_below <= 1:
        message = f"fail_if_retained_below is {fail_if_retained_below}; it is a share, from 0 to 1"
        raise ConfigError(message)
    size = parse_size(max_shard_size) if max_shard_size is not None else None
    form = _form(dtype, size, requantise=requantise, keep_touched_in=keep_touched_in, base_as=base_as)
    place = placement(backend, device)
    source, pairs = open_inputs(
        base, adapters, scale, allow_unmatched=allow_unmatched, base_as=base_as, quantised=form.quantised
    )
    read = [source.files.path, *([source.original.path] if source.original is not None else [])]
    read = list(dict.fromkeys([Path(base), *read, *(Path(adapter.name) for adapter, _ in pairs)]))
    finished = check_place(target, read, dry_run=dry_run)
    plan = make_plan(source, pairs, form, place=place.name)
    for adapter, _ in pairs:
        check_numbers(adapter)
    report = _planned(plan, target, workers, dry_run=dry_run)
    idle = tuple(f"{adapter.name} has the scale 0 and changes nothing" for adapter, weight in pairs if not weight)
    report = replace(report, notes=(*report.notes, *idle))
    if dry_run:
        return replace(report, seconds=time.perf_counter() - started)

    if planned is not None:
        planned(plan.nbytes)

    def finish(tensors: tuple[TensorReport, ...], folder: Path, resumed: int) -> MergeReport:
        notes = write_side_files(plan, folder)
        errors = source.errors
        known = tuple(replace(tensor, base_error=errors.get(tensor.name)) for tensor in tensors)
        done = replace(report, tensors=known, notes=(*report.notes, *notes), resumed=resumed)
        if verify:
            _verify(source, pairs, folder)
        _check_quality(done, fail_if_retained_below, folder)
        if not allow_lost_updates:
            _check_kept(done, {encoded.name for encoded in plan.encoded}, folder)
        return done

    done = write_plan(plan, target, finish, threads=workers, progress=progress, place=place, adopt=finished)
    return replace(done, seconds=time.perf_counter() - started)


def _form(
    dtype: str | None, size: int | None, *, requantise: bool, keep_touched_in: str | None, base_as: str | None
) -> Form:
    kind = parse_dtype(dtype) if dtype is not None else None
    kept = parse_dtype(keep_touched_in) if keep_touched_in is not None else None
    form = Form(kind, requantise, kept, size)
    if requantise and kept is not None:
        message = "requantise and keep_touched_in contradict each other; give one of them"
        raise ConfigError(message)
    if form.quantised and kind is not None:
        message = (
            f"dtype is {dtype!r}, and a base that stays quantised keeps its dtypes; leave it out, or say "
            "keep_touched_in for the weights that an adapter changes"
        )
        raise ConfigError(message)
    if form.quantised and base_as is None:
        what = "requantise" if requantise else "keep_touched_in"
        message = f"{what} is for a quantised base; say base_as: --base-as dequantised, or --base-as original=PATH"
        raise ConfigError(message)
    return form


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


def _verify(base: Base, adapters: Sequence[tuple[Adapters, float]], folder: Path) -> None:
    from peftarray.merging.verification import verify_plan

    checked = verify_plan(make_plan(base, adapters), Checkpoint.open(folder), rows=None)
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


def _check_kept(report: MergeReport, requantised: set[str], partial: Path) -> None:
    """Refuse weights whose update went down in their codec."""
    lost = [tensor for tensor in report.flagged if tensor.name in requantised and tensor.retained < LEAST_KEPT]
    if lost:
        worst = lost[0]
        message = (
            f"requantising loses the update: {len(lost)} of {len(requantised)} weights hold less than "
            f"{LEAST_KEPT:.0%} of it; the worst, {worst.name}, holds {worst.retained:.1%} ({worst.dtype} errs by "
            f"{worst.error:.3g} times the update, and {worst.unchanged:.1%} of its codes are the base's); keep touched "
            "weights in more bits (--keep-touched-in bfloat16), leave out --requantise, or allow it "
            f"(--allow-lost-updates): the finished work is kept in {partial}"
        )
        raise QualityError(message)
