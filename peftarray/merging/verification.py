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
from peftarray.merging.base import Base, read_base
from peftarray.merging.contributions import Contribution, Part, Segment
from peftarray.merging.encoded import Encoded, planned_tensors
from peftarray.merging.inputs import PathLike, open_inputs
from peftarray.merging.merge_plan import make_plan
from peftarray.merging.origin import Origin, StoredOrigin, taking
from peftarray.merging.plan import Output, Plan
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["Verification", "verify", "verify_plan"]

_BLOCK = 1 << 22
"""Entries looked at at once: 32 MB of float64."""
_SINGLE = 1e-6
"""float32's noise, relative to the numbers that were added."""
_CODES = 0.05
"""A scale between two codes may fall to either; the error of requantising may grow by this part for such ones."""


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
    base_as: str | None = None,
) -> Verification:
    """Recompute a merged checkpoint in float64 and compare.

    An entry may differ from the float64 result by half a unit in the last place of its dtype, plus float32's noise.
    Tensors that no adapter touches must equal the base's bytes, or the base rounded where the dtype differs. A weight
    that is quantised in the result must be what its codec makes of the float64 result.

    Args:
        base, adapters, scale, allow_unmatched, base_as: as they were given to `merge`.
        merged: the folder (or file) to check, written by this or any other tool.
        rows: look at so many rows of each tensor, spread evenly; None for all.

    Raises:
        PeftError: the inputs cannot be read. A merge that does not hold up is not an error but `passed == False`.
    """
    if rows is not None and rows < 1:
        message = f"rows is {rows}; it must be at least 1, or None for all"
        raise ConfigError(message)
    result = Checkpoint.open(str(merged))
    source, pairs = open_inputs(
        base,
        adapters,
        scale,
        allow_unmatched=allow_unmatched,
        base_as=base_as,
        quantised=bool(read_base(result).quantised),
    )
    return verify_plan(make_plan(source, pairs), result, rows=rows)


def verify_plan(plan: Plan, result: Checkpoint, *, rows: int | None) -> Verification:
    """Check a result against the plan of a merge that quantises nothing; what the result holds quantised is decoded."""
    found = Verification()
    merged = read_base(result)
    with np.errstate(all="ignore"):  # what is not finite is compared as such
        _check_all(plan, merged, rows, found)
    return found


def _check_all(plan: Plan, merged: Base, rows: int | None, found: Verification) -> None:
    outputs = {output.name: output for output in plan.outputs}
    found.failures += [f"{name} is missing" for name in outputs if name not in merged.tensors]
    found.failures += [f"{name} belongs to neither base nor adapter" for name in merged.tensors if name not in outputs]
    for adapter, _ in plan.adapters:
        for name, value in adapter.config_changes.items():
            config = merged.files.config
            if config and config.get(name) != value:
                found.failures.append(f"config.json says {name} = {config.get(name)!r}; the merge makes it {value!r}")
    for name, output in outputs.items():
        if name in merged.tensors:
            found.tensors += 1
            message = _check(output, plan.base, merged, rows, found)
            if message:
                found.failures.append(message)


def _check(output: Output, base: Base, merged: Base, rows: int | None, found: Verification) -> str | None:
    info, name = merged.tensors[output.name], output.name
    if info.shape != output.info.shape:
        return f"{name} has shape {info.shape}; the merge makes it {output.info.shape}"
    if not output.segments:
        pairs = _copied(output, base, merged)
        if pairs:
            found.copied += 1
            same = all(_same_bytes(here, there) for here, there in pairs)
            return None if same else f"{name} differs from its source, and no adapter touches it"
    if name in merged.quantised:
        return _compare_codes(output, merged, found)
    if not (info.dtype.floating and output.origin.dtype.floating):
        return f"{name} is {info.code}; the merge makes it {output.info.code}"
    got = merged.origin(name)
    for segment in output.segments or (Segment(0, math.prod(info.shape) // max(1, output.columns), ()),):
        for begin, end in _blocks(segment, output.columns, rows):
            message = _compare(output, segment, begin, end, got, found)
            if message:
                return message
    return None


def _copied(output: Output, base: Base, merged: Base) -> list[tuple[StoredOrigin, StoredOrigin]]:
    """Tensors of the base and of the result that must have the same bytes; none where the numbers must be compared."""
    name, origin = output.name, output.origin
    if name not in merged.quantised:
        here = merged.files[name]
        stored = isinstance(origin, StoredOrigin) and origin.info.code == here.code
        return [(origin, StoredOrigin(merged.files.shard_of(name), here))] if stored else []  # type: ignore[list-item]
    weight, result = base.quantised.get(name), merged.quantised[name]
    if weight is None or weight.codec != result.codec or set(weight.names()) != set(result.names()):
        return []
    pairs = []
    for tensor in weight.names():
        before, after = base.files[tensor], merged.files[tensor]
        if before.nbytes != after.nbytes:
            return []
        files = base.files.shard_of(tensor), merged.files.shard_of(tensor)
        pairs.append((StoredOrigin(files[0], before), StoredOrigin(files[1], after)))
    return pairs


def _same_bytes(source: StoredOrigin, result: StoredOrigin) -> bool:
    for at in range(0, result.info.nbytes, _BLOCK):
        count = min(_BLOCK, result.info.nbytes - at)
        here, there = np.empty(count, np.uint8), np.empty(count, np.uint8)
        result.file.read_into(here, result.info.begin + at)
        source.file.read_into(there, source.info.begin + at)
        if not np.array_equal(here, there):
            return False
    return True


def _compare_codes(output: Output, merged: Base, found: Verification) -> str | None:
    """That a quantised weight is what its codec makes of the float64 result; it takes the whole weight at once."""
    weight, columns = merged.quantised[output.name], output.columns
    count = math.prod(output.info.shape) // max(1, columns)
    wanted = np.empty((count, columns), np.float32)
    for segment in output.segments or (Segment(0, count, ()),):
        for begin, end in _blocks(segment, columns, None):
            wanted[begin:end] = _wanted(output, segment, begin, end)[0]
    code, layout = merged.tensors[output.name].code, merged.require_layout()
    tensors = planned_tensors(layout, weight, merged.stated, code, merged.files)
    encoded = Encoded(weight, layout, merged.stated, code, output.origin, columns, (), tensors)
    written = encoded.encode(wanted)
    expect = taking(encoded.stored(written), encoded.stored(written).parts(written.__getitem__), columns)
    got = merged.origin(output.name)
    worse = lost = size = 0.0
    for begin, end in _blocks(Segment(0, count, ()), columns, None):
        expected, here = expect(begin, end), got.read(begin, end, columns)
        found.entries += here.size
        found.exact += int(np.count_nonzero(expected == here))
        error, least = np.abs(here - wanted[begin:end]), np.abs(expected - wanted[begin:end])
        # A number halfway between two codes may fall to either, and is no farther from it then.
        worse += float(np.square(np.maximum(error - least, 0), dtype=np.float64).sum())
        lost += float(np.square(least, dtype=np.float64).sum())
        size += float(np.square(wanted[begin:end], dtype=np.float64).sum())
    worst = math.sqrt(worse) / (_CODES * math.sqrt(lost) + _SINGLE * math.sqrt(size) or 1.0)
    found.worst = max(found.worst, worst)
    if worst <= 1:
        return None
    return (
        f"{output.name} is not what {weight.codec.kind} makes of the float64 result: it is farther from that by "
        f"{math.sqrt(worse / size) if size else math.inf:.3g} of its norm, {worst:.3g} times what is allowed"
    )


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


def _compare(output: Output, segment: Segment, begin: int, end: int, merged: Origin, found: Verification) -> str | None:
    wanted, size = _wanted(output, segment, begin, end)
    got = _read(merged, begin, wanted.shape)
    allowed = _half_unit(wanted, merged.dtype) + _SINGLE * size
    off = np.abs(got - wanted) / allowed
    both = ~np.isfinite(wanted) & ((got == wanted) | (np.isnan(got) & np.isnan(wanted)))
    off = np.where(both | (got == wanted), 0.0, np.where(np.isfinite(off), off, np.inf))
    found.entries += off.size
    found.exact += int(np.count_nonzero(both | (encode(wanted, merged.dtype).astype(np.float64) == got)))
    worst = float(off.max(initial=0.0))
    found.worst = max(found.worst, worst)
    if worst <= 1:
        return None
    row, column = np.unravel_index(int(off.argmax()), wanted.shape)
    return (
        f"{output.name}, row {begin + int(row)}, column {int(column)}: found {got[row, column]:.9g}, the float64 "
        f"result is {wanted[row, column]:.9g} ({worst:.3g} times the allowed difference; "
        f"{int((off > 1).sum())} entries are off)"
    )


def _wanted(output: Output, segment: Segment, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The float64 result, and the size of the terms that were added up to it."""
    base = _read(output.origin, begin, (end - begin, output.columns))
    wanted, size = base, np.abs(base)
    for contribution in segment.contributions:
        value, delta, terms = _one(contribution, output, base, begin, end)
        alone = contribution.weight == 1 and len(segment.contributions) == 1
        wanted = value if alone else wanted + contribution.weight * delta
        size = size + abs(contribution.weight) * terms
    return wanted, size


def _one(
    contribution: Contribution, output: Output, base: np.ndarray, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F(W), F(W) - W, and the size of the terms that were added up to it, entry by entry."""
    tensors = contribution.adapters.tensors
    value, terms = base, np.zeros_like(base)
    if contribution.replacement is not None:
        info = tensors[contribution.replacement.name]
        value = _read(StoredOrigin(tensors.shard_of(info.name), info), begin, base.shape)
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
    stored = _read(output.origin, part.piece.at, part.site.stored_matrix)
    return stored.T if part.site.layer.transposed else stored


def _read(origin: Origin, begin: int, shape: tuple[int, ...]) -> np.ndarray:
    return origin.read(begin, begin + shape[0], shape[1]).astype(np.float64)


def _half_unit(values: np.ndarray, dtype: StorageDType) -> np.ndarray:
    """Half the distance between neighbours of `dtype` at each value."""
    import ml_dtypes

    facts = ml_dtypes.finfo(dtype.numpy)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), float(facts.smallest_normal))))
    return 0.5 * np.exp2(exponent - facts.nmant)
