"""One segment of a tensor: its methods prepared once, then any of its rows merged, rounded and measured."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from peftarray.arrays import Params
from peftarray.dtypes import StorageDType, decode, encode
from peftarray.errors import NumberError
from peftarray.formats.adapters import Ref, Site
from peftarray.merging.contributions import Contribution, Part, Segment
from peftarray.merging.origin import Origin
from peftarray.merging.placement import Placement
from peftarray.merging.report import Sums

__all__ = ["TILE", "Changed", "Scratch", "SegmentMerger", "can_tile", "rows_in"]

TILE = 1 << 19
"""Entries a tile: 2 MB of float32. Smaller ones fit a core's own cache, but then threads wait for each other: NumPy
takes the interpreter's lock again after every operation, and one on a large tile is long enough to hide that."""


# Dtypes with float32's range at least: what is finite before rounding is so afterwards, or its square is not.
_WIDE = ("BF16", "F32", "F64")
_SAMPLE, _SAMPLE_ROWS = 1 << 15, 8
"""Of a tile with more than twice so many entries, about so many are measured, in so many rows at least."""


class Scratch:
    """Buffers of one thread, kept from tile to tile: memory that is reused stays in the cache."""

    def __init__(self) -> None:
        self._bytes: dict[str, np.ndarray] = {}
        self._views: dict[tuple[str, tuple[int, ...], np.dtype], np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of this shape and dtype under a name, its values undefined."""
        view = self._views.get((name, shape, dtype))
        if view is None:
            nbytes = math.prod(shape) * dtype.itemsize
            if name not in self._bytes or self._bytes[name].nbytes < nbytes:
                self._bytes[name] = np.empty(nbytes, np.uint8)
                # Views of the smaller buffer would keep it alive.
                self._views = {key: kept for key, kept in self._views.items() if key[0] != name}
            view = self._views[name, shape, dtype] = self._bytes[name][:nbytes].view(dtype).reshape(shape)
        return view


def can_tile(segment: Segment) -> bool:
    """Whether every method of a segment allows cuts along the rows of the stored matrix."""
    parts = [part for contribution in segment.contributions for part in contribution.parts]
    return all(part.site.row_axis in part.site.method.tiles.split() for part in parts)


def rows_in(size: int, width: int, step: int) -> int:
    """Rows of this width that are of this size together, in whole steps of rows and at least one."""
    return max(1, size // max(1, width) // step) * step


class Changed(Protocol):
    """A tensor of the result that adapters change."""

    @property
    def name(self) -> str: ...

    @property
    def origin(self) -> Origin:
        """What it starts as."""

    @property
    def dtype(self) -> StorageDType:
        """What the merged numbers are rounded to."""

    @property
    def columns(self) -> int:
        """Of the matrix that it is seen as."""


class SegmentMerger:
    """Merges rows of one segment. Threads may share it: preparing is done once, by the first that comes.

    Args:
        output: the tensor.
        segment: the rows.
        place: where the methods' arrays lie, and updates are computed.
    """

    def __init__(self, output: Changed, segment: Segment, place: Placement) -> None:
        self.output = output
        self.segment = segment
        self.place = place
        self.source = output.origin.dtype
        self.target = output.dtype
        self.compute = np.dtype(np.float64) if "F64" in (self.source.code, self.target.code) else np.dtype(np.float32)
        self._lock = threading.Lock()
        self._steps: list[int] = []
        self._prepared: dict[int, Callable[[int, int], Params]] | None = None

    def prepared(self) -> dict[int, Callable[[int, int], Params]]:
        """By a site's identity, the prepared parameters for rows `(start, stop)` of its stored matrix."""
        if self._prepared is None:
            with self._lock:
                if self._prepared is None:
                    self._prepared = {
                        id(part.site): self._prepare(part.site, contribution)
                        for contribution in self.segment.contributions
                        for part in contribution.parts
                    }
        return self._prepared

    def _prepare(self, site: Site, contribution: Contribution) -> Callable[[int, int], Params]:
        raw = contribution.adapters.params(site, self.compute, partial(self._whole, site))
        p = site.method.prepare({name: self.place.put(array) for name, array in raw.items()}, site.layer)
        if site.row_axis not in site.method.tiles.split():
            return lambda start, stop: p
        self._steps.append(site.method.granularity(p, site.layer, site.row_axis))
        return site.method.cutter(p, site.layer, site.row_axis)

    def _whole(self, site: Site) -> np.ndarray:
        """The base weight of a site, from the rows of this tensor (a site that spans several is read by none yet)."""
        rows, columns = site.stored_matrix
        stored = self.output.origin.read(self.segment.begin, self.segment.begin + rows, columns)
        matrix = decode(stored, self.source).astype(self.compute, copy=False)
        return matrix.T if site.layer.transposed else matrix

    def row_step(self) -> int:
        """Tiles must begin at multiples of this many rows of the segment."""
        self.prepared()
        return math.lcm(*self._steps)

    def merge(self, stored: np.ndarray, begin: int, rounded: np.ndarray, scratch: Scratch) -> Sums:
        """Merge rows of the tensor's matrix, and sum up what was done. The caller silences floating-point warnings.

        Args:
            stored: the rows as they are stored, `(rows, columns)`.
            begin: which rows they are, counted in the tensor.
            rounded: where the result goes, in the output's dtype.
            scratch: of the calling thread.
        """
        # What is a number already is read where it lies, and not written to.
        own = stored.dtype != self.compute
        base = decode(stored, self.source, scratch.array("base", stored.shape, self.compute)) if own else stored
        flat = base.reshape(-1)
        sums = Sums(count=base.size, base=float(np.dot(flat, flat)))
        value, delta = self._effective(base, begin, begin + len(base))
        sums.update = float(np.dot(delta.reshape(-1), delta.reshape(-1)))
        if value is None:
            # A short dtype's rounding dwarfs float32's, so the sum may stand in for what was wanted.
            short = self.target.bits < 32
            value = np.add(base, delta, out=base if short and own else None)
        encode(value, self.target, rounded)
        if not math.isfinite(sums.base + sums.update) or self.target.code not in _WIDE:
            self._check_finite(sums, stored, delta, rounded)
        self._measure(sums, stored, base, value, delta, rounded)
        return sums

    def _effective(self, base: np.ndarray, begin: int, end: int) -> tuple[np.ndarray | None, np.ndarray]:
        """W + sum c (F(W) - W) where it is known better than as the sum of W and the update, and the update."""
        contributions = self.segment.contributions
        if len(contributions) == 1 and contributions[0].weight == 1:
            return self._one(contributions[0], base, begin, end)
        total = np.zeros_like(base)
        for contribution in contributions:
            total += contribution.weight * self._one(contribution, base, begin, end)[1]
        return None, total

    def _one(
        self, contribution: Contribution, base: np.ndarray, begin: int, end: int
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """F(W), None where it is the sum of W and the update, and F(W) - W of one adapter."""
        value, delta = None, None
        if contribution.replacement is not None:
            value = self._rows_of(contribution.replacement, contribution, begin, end)
            delta = value - base
        for site in contribution.biases:
            raw = {name: ref.read(contribution.adapters.tensors, self.compute) for name, ref in site.params.items()}
            before = base if value is None else value
            value = site.method.effective_bias(raw, before.reshape(-1), None, site.layer).reshape(base.shape)
            delta = value - base
        for part in contribution.parts:
            if value is None and delta is not None:
                value = base + delta
            update = self._update(part, base if value is None else value, begin, end)
            value = None if value is None else value + update
            delta = update if delta is None else delta + update
        return value, np.zeros_like(base) if delta is None else delta

    def _update(self, part: Part, value: np.ndarray, begin: int, end: int) -> np.ndarray:
        site, piece = part.site, part.piece
        start = piece.start + begin - piece.at
        p = self.prepared()[id(site)](start, start + end - begin)
        w = self.place.put(value)
        update = self.place.get(site.method.update(p, w.T if site.layer.transposed else w, site.layer))
        return np.ascontiguousarray(update.T) if site.layer.transposed else update

    def _rows_of(self, ref: Ref, contribution: Contribution, begin: int, end: int) -> np.ndarray:
        tensors = contribution.adapters.tensors
        info = tensors[ref.name]
        stored = np.empty((end - begin, self.output.columns), info.dtype.numpy)
        offset = info.begin + begin * self.output.columns * stored.dtype.itemsize
        tensors.shard_of(ref.name).read_into(stored, offset)
        return decode(stored, info.dtype).astype(self.compute, copy=False)

    def _measure(
        self,
        sums: Sums,
        stored: np.ndarray,
        base: np.ndarray,
        value: np.ndarray,
        delta: np.ndarray,
        rounded: np.ndarray,
    ) -> None:
        """Add what the rounding did, from rows of a large tile that stand for the others; `base` may be `value`."""
        if not sums.update:
            sums.measured, sums.unchanged = sums.count, float(sums.count)
            return
        every = 1
        if sums.count > 2 * _SAMPLE and not sums.nonfinite:
            every = max(1, min(sums.count // _SAMPLE, len(stored) // _SAMPLE_ROWS))
        wanted = delta[every // 2 :: every]
        squares = _inner(wanted, wanted)
        if not 0.5 <= squares * every / sums.update <= 2:
            every, wanted = 1, delta
            squares = _inner(delta, delta)
        rows = slice(every // 2, None, every)
        written = rounded[rows]
        error = decode(written, self.target)
        if base is value:
            error -= value[rows]
        else:
            error -= base[rows]
            error -= wanted
        if sums.nonfinite:
            sound = np.isfinite(error)
            wanted, error = np.where(sound, wanted, 0), np.where(sound, error, 0)
            squares = _inner(wanted, wanted)
        bits = np.dtype(f"u{written.dtype.itemsize}")
        before = stored[rows] if self.source == self.target else encode(decode(stored[rows], self.source), self.target)
        stayed = np.count_nonzero(before.view(bits) == written.view(bits))
        sums.measured = written.size
        share = sums.count / written.size
        sums.wanted, sums.rounding = squares * share, _inner(error, error) * share
        sums.cross, sums.unchanged = _inner(wanted, error) * share, float(stayed * share)

    def _check_finite(self, sums: Sums, stored: np.ndarray, delta: np.ndarray, rounded: np.ndarray) -> None:
        """Count entries that are not finite, as the base's are; refuse new ones, which overflow the output's dtype."""
        bad = ~np.isfinite(decode(rounded, self.target))
        if not bad.any():
            return
        base = decode(stored, self.source)
        new = bad & np.isfinite(base)
        if new.any():
            message = (
                f"{self.output.name}: {int(new.sum())} entries overflow {self.target.code} (the largest is "
                f"{float(np.abs(base + delta)[new].max()):.3g}); write a wider dtype (--dtype bfloat16 or float32), or "
                "lower the scale"
            )
            raise NumberError(message)
        sums.nonfinite = int(bad.sum())
        base, delta = np.where(bad, 0, base).reshape(-1), np.where(bad, 0, delta).reshape(-1)
        sums.base, sums.update = float(np.dot(base, base)), float(np.dot(delta, delta))


def _inner(a: np.ndarray, b: np.ndarray) -> float:
    """The sum over the products of two matrices' entries, whose rows may lie apart."""
    return float(np.vecdot(a, b).sum(dtype=np.float64))
