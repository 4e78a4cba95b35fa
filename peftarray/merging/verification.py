"""Check a merged checkpoint against base and adapters by a path of its own: float64, without the merger's rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from peftarray.dtypes import StorageDType, encode
from peftarray.errors import ConfigError
from peftarray.merging.merger import PathLike, open_inputs
from peftarray.merging.plan import Contribution, Output, Part, Plan, Segment, make_plan
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import TensorInfo

__all__ = ["Verification", "verify", "verify_plan"]

_BLOCK = 1 << 22
"""Entries looked at at once: 32 MB of float64."""
_SINGLE = 1e-6
"""float32's noise, relative to the numbers that were added."""


@dataclass
class Verification:
    """What a check found.

    Attributes:
        tensors: how many tensors of the result were looked at.
        copied: how many of them had to equal their source byte for byte.
        entries: how many entries were recomputed.
        exact: how many of those are the float64 result, rounded once.
        worst: the largest deviation, in units of what is allowed: half a unit in the last place plus float32's noise.
        failures: what is wrong, one line each; empty if all is well.
    """

    tensors: int = 0
    copied: int = 0
    entries: int = 0
    exact: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def exact_share(self) -> float:
        return self.exact / self.entries if self.entries else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "passed": self.passed,
            "tensors": self.tensors,
            "copied": self.copied,
            "entries": self.entries,
            "exact_share": self.exact_share,
            "worst": self.worst,
            "failures": self.failures,
        }


def verify(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    merged: PathLike,
    *,
    scale: float | Sequence[float] = 1.0,
    rows: int | None = None,
    allow_unmatched: bool = False,
) -> Verification:
    """Recompute a merged checkpoint in float64 and compare.

    An entry may differ from the float64 result by half a unit in the last place of its dtype, plus float32's noise.
    Tensors that no adapter touches must equal the base's bytes, or the base rounded where the dtype differs.

    Args:
        base, adapters, scale, allow_unmatched: as they were given to `merge`.
        merged: the folder (or file) to check, written by this or any other tool.
        rows: look at so many rows of each tensor, spread evenly; None for all.

    Raises:
        PeftError: the inputs cannot be read. A merge that does not hold up is not an error but `passed == False`.
    """
    if rows is not None and rows < 1:
        message = f"rows is {rows}; it must be at least 1, or None for all"
        raise ConfigError(message)
    source, pairs = open_inputs(base, adapters, scale, allow_unmatched=allow_unmatched)
    return verify_plan(make_plan(source, pairs), Checkpoint.open(str(merged)), rows=rows)


def verify_plan(plan: Plan, merged: Checkpoint, *, rows: int | None) -> Verification:
    """Check `merged` against what a plan says."""
    found = Verification()
    with np.errstate(all="ignore"):  # what is not finite is compared as such
        _check_all(plan, merged, rows, found)
    return found


def _check_all(plan: Plan, merged: Checkpoint, rows: int | None, found: Verification) -> None:
    outputs = {output.name: output for output in plan.outputs}
    found.failures += [f"{name} is missing" for name in outputs if name not in merged]
    found.failures += [f"{name} belongs to neither base nor adapter" for name in merged if name not in outputs]
    for adapter, _ in plan.adapters:
        for name, value in adapter.config_changes.items():
            if merged.config and merged.config.get(name) != value:
                found.failures.append(
                    f"config.json says {name} = {merged.config.get(name)!r}; the merge makes it {value!r}"
                )
    for name, output in outputs.items():
        if name in merged:
            _check(output, merged, rows, found)


def _check(output: Output, merged: Checkpoint, rows: int | None, found: Verification) -> None:
    info = merged[output.name]
    found.tensors += 1
    if info.shape != output.shape:
        found.failures.append(f"{output.name} has shape {info.shape}; the merge makes it {output.shape}")
        return
    if not output.segments and info.code == output.info.code:
        found.copied += 1
        if not _same_bytes(output, merged, info):
            found.failures.append(f"{output.name} differs from its source, and no adapter touches it")
        return
    if not (info.dtype.floating and output.info.dtype.floating):
        found.failures.append(f"{output.name} is {info.code}; the merge makes it {output.code}")
        return
    for segment in output.segments or (Segment(0, math.prod(output.shape) // max(1, output.columns), ()),):
        for begin, end in _blocks(segment, output.columns, rows):
            message = _compare(output, segment, begin, end, merged, info, found)
            if message:
                found.failures.append(message)
                return


def _same_bytes(output: Output, merged: Checkpoint, info: TensorInfo) -> bool:
    shard = merged.shard_of(output.name)
    for at in range(0, info.nbytes, _BLOCK):
        count = min(_BLOCK, info.nbytes - at)
        here, there = np.empty(count, np.uint8), np.empty(count, np.uint8)
        shard.read_into(here, info.begin + at)
        output.source.read_into(there, output.info.begin + at)
        if not np.array_equal(here, there):
            return False
    return True


def _blocks(segment: Segment, columns: int, rows: int | None) -> Iterator[tuple[int, int]]:
    """Row ranges to look at; all at once where a method does not allow cuts."""
    size = segment.end - segment.begin
    parts = [part for c in segment.contributions for part in c.parts]
    steps = [_step(part) for part in parts]
    if not all(steps):
        yield segment.begin, segment.end
        return
    step = math.lcm(*(s for s in steps if s)) if steps else 1
    block = max(1, _BLOCK // max(1, columns) // step) * step
    if rows is None or rows >= size:
        for begin in range(segment.begin, segment.end, block):
            yield begin, min(begin + block, segment.end)
        return
    for i in range(-(-rows // step)):
        begin = segment.begin + (i * size * step // rows) // step * step
        yield begin, min(begin + step, segment.end)


def _step(part: Part) -> int | None:
    """Rows that must stay together, None for all."""
    site = part.site
    if site.row_axis not in site.method.tiles.split():
        return None
    table = site.method.params(site.layer)
    stand_ins = {
        name: np.empty([n or 1 for n in row.shape]) for name, row in table.items() if row.stored and 0 not in row.shape
    }
    return site.method.granularity(stand_ins, site.layer, site.row_axis) if site.method.grain(site.layer) > 1 else 1


def _compare(
    output: Output, segment: Segment, begin: int, end: int, merged: Checkpoint, info: TensorInfo, found: Verification
) -> str | None:
    shape = (end - begin, output.columns)
    base = _read(output.source, output.info, begin, shape)
    wanted, size = base, np.abs(base)
    for contribution in segment.contributions:
        value, delta, terms = _one(contribution, output, base, begin, end)
        alone = contribution.weight == 1 and len(segment.contributions) == 1
        wanted = value if alone else wanted + contribution.weight * delta
        size = size + abs(contribution.weight) * terms
    got = _read(merged.shard_of(output.name), info, begin, shape)
    allowed = _half_unit(wanted, info.dtype) + _SINGLE * size
    off = np.abs(got - wanted) / allowed
    both = ~np.isfinite(wanted) & ((got == wanted) | (np.isnan(got) & np.isnan(wanted)))
    off = np.where(both | (got == wanted), 0.0, np.where(np.isfinite(off), off, np.inf))
    found.entries += off.size
    found.exact += int(np.count_nonzero(both | (encode(wanted, info.dtype).astype(np.float64) == got)))
    worst = float(off.max(initial=0.0))
    found.worst = max(found.worst, worst)
    if worst <= 1:
        return None
    row, column = np.unravel_index(int(off.argmax()), shape)
    return (
        f"{output.name}, row {begin + int(row)}, column {int(column)}: found {got[row, column]:.9g}, the float64 "
        f"result is {wanted[row, column]:.9g} ({worst:.3g} times the allowed difference; "
        f"{int((off > 1).sum())} entries are off)"
    )


def _one(
    contribution: Contribution, output: Output, base: np.ndarray, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F(W), F(W) - W, and the size of the terms that were added up to it, entry by entry."""
    tensors = contribution.adapters.tensors
    value, terms = base, np.zeros_like(base)
    if contribution.replacement is not None:
        info = tensors[contribution.replacement.name]
        value = _read(tensors.shard_of(info.name), info, begin, base.shape)
        terms = np.abs(value)
    for site in contribution.biases:
        raw = {name: ref.read(tensors, np.dtype(np.float64)) for name, ref in site.params.items()}
        value = site.method.effective_bias(raw, value.reshape(-1), None, site.layer).reshape(base.shape)
        terms = terms + np.abs(value)
    for part in contribution.parts:
        site, piece = part.site, part.piece
        raw = contribution.adapters.params(site, np.dtype(np.float64), partial(_whole, part, output))
        flip = site.layer.transposed
        p = site.method.prepare(raw, site.layer)
        if site.row_axis in site.method.tiles.split():
            start = piece.start + begin - piece.at
            p = site.method.cut(p, site.layer, site.row_axis, start, start + end - begin)
        effective = site.method.weight(p, value.T if flip else value, site.layer)
        effective = effective.T if flip else effective
        change = np.abs(effective - value)
        change[~np.isfinite(change)] = 0.0  # an entry that is none in the base says nothing about its row
        # A product of factors may cancel; the largest entry of a row stands for the size of what was added up.
        terms = terms + np.maximum(change, 8 * change.max(axis=1, keepdims=True, initial=0.0))
        value = effective
    return value, value - base, terms


def _whole(part: Part, output: Output) -> np.ndarray:
    stored = _read(output.source, output.info, part.piece.at, part.site.stored_matrix)
    return stored.T if part.site.layer.transposed else stored


def _read(file: Any, info: TensorInfo, begin: int, shape: tuple[int, int]) -> np.ndarray:
    stored = np.empty(shape, info.dtype.numpy)
    file.read_into(stored, info.begin + begin * shape[1] * stored.dtype.itemsize)
    return stored.astype(np.float64)


def _half_unit(values: np.ndarray, dtype: StorageDType) -> np.ndarray:
    """Half the distance between neighbours of `dtype` at each value."""
    import ml_dtypes

    facts = ml_dtypes.finfo(dtype.numpy)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), float(facts.smallest_normal))))
    return 0.5 * np.exp2(exponent - facts.nmant)
