"""One segment of a tensor: its methods prepared once, then any of its rows merged, rounded and measured, tile by tile."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from peftarray.arrays import Params
from peftarray.dtypes import decode, encode
from peftarray.errors import NumberError
from peftarray.formats.adapters import Ref, Site
from peftarray.merging.plan import Contribution, Output, Part, Segment
from peftarray.merging.report import Sums

__all__ = ["Scratch", "SegmentMerger", "can_tile", "row_step"]


@dataclass
class Scratch:
    """Buffers of one thread, kept from tile to tile: memory that is reused stays in the cache."""

    buffers: dict[str, np.ndarray] = field(default_factory=dict)

    def array(self, name: str, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """An array of this shape and dtype under a name, its values undefined."""
        nbytes = shape[0] * shape[1] * dtype.itemsize
        kept = self.buffers.get(name)
        if kept is None or kept.nbytes < nbytes:
            kept = self.buffers[name] = np.empty(nbytes, np.uint8)
        return kept[:nbytes].view(dtype).reshape(shape)


def can_tile(segment: Segment) -> bool:
    """Whether every method of a segment allows cuts along the rows of the stored matrix."""
    parts = [part for contribution in segment.contributions for part in contribution.parts]
    return all(part.site.row_axis in part.site.method.tiles.split() for part in parts)


def row_step(part: Part, prepared: Params) -> int:
    """Cuts of the stored matrix must fall on multiples of this many rows."""
    site = part.site
    return site.method.granularity(prepared, site.layer, site.row_axis)


class SegmentMerger:
    """Merges rows of one segment. Threads may share it: preparing is done once, by the first that comes.

    Args:
        output: the tensor.
        segment: the rows.
    """

    def __init__(self, output: Output, segment: Segment) -> None:
        self.output = output
        self.segment = segment
        self.source = output.info.dtype
        self.target = output.dtype
        self.compute = np.dtype(np.float64) if "F64" in (self.source.code, self.target.code) else np.dtype(np.float32)
        self._lock = threading.Lock()
        self._prepared: dict[int, Params] | None = None

    def prepared(self) -> dict[int, Params]:
        """What each site's method prepares, by the site's identity."""
        with self._lock:
            if self._prepared is None:
                self._prepared = {
                    id(part.site): self._prepare(part.site, contribution)
                    for contribution in self.segment.contributions
                    for part in contribution.parts
                }
            return self._prepared

    def _prepare(self, site: Site, contribution: Contribution) -> Params:
        tensors = contribution.adapters.tensors
        raw = {name: ref.read(tensors, self.compute) for name, ref in site.params.items()}
        if site.method.reads_base(site.layer):
            raw |= site.method.derive(site.layer, raw, self._whole(site))
        return site.method.prepare(raw, site.layer)

    def _whole(self, site: Site) -> np.ndarray:
        """The base weight of a site, from the rows of this tensor (a site that spans several is read by none yet)."""
        rows, columns = site.stored_matrix
        stored = np.empty((rows, columns), self.source.numpy)
        self._read(stored, self.segment.begin)
        matrix = decode(stored, self.source).astype(self.compute, copy=False)
        return matrix.T if site.layer.transposed else matrix

    def row_step(self) -> int:
        """Tiles must begin at multiples of this many rows of the segment."""
        prepared = self.prepared()
        steps = [row_step(part, prepared[id(part.site)]) for c in self.segment.contributions for part in c.parts]
        return int(np.lcm.reduce(steps)) if steps else 1

    def merge(self, begin: int, end: int, scratch: Scratch) -> tuple[np.ndarray, Sums]:
        """Rows `begin:end` of the tensor's matrix, rounded to its dtype, and their sums.

        The result lies in `scratch` and is valid until the next call with it.
        """
        shape = (end - begin, self.output.columns)
        stored = scratch.array("stored", shape, self.source.numpy)  # type: ignore[arg-type]
        self._read(stored, begin)
        base = decode(stored, self.source, scratch.array("base", shape, self.compute))
        wanted, delta = self._effective(base, begin, end)
        rounded = encode(wanted, self.target, scratch.array("rounded", shape, self.target.numpy))  # type: ignore[arg-type]
        return rounded, self._measure(stored, base, delta, rounded, scratch)

    def _read(self, stored: np.ndarray, begin: int) -> None:
        offset = self.output.info.begin + begin * stored.shape[1] * stored.dtype.itemsize
        self.output.source.read_into(stored, offset)

    def _effective(self, base: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """W + sum c (F(W) - W), and that sum."""
        total = None
        for contribution in self.segment.contributions:
            value, delta = self._one(contribution, base, begin, end)
            if contribution.weight == 1 and len(self.segment.contributions) == 1:
                return value, delta
            delta = delta * contribution.weight
            total = delta if total is None else total + delta
        if total is None:
            total = np.zeros_like(base)
        return base + total, total

    def _one(self, contribution: Contribution, base: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """F(W) and F(W) - W of one adapter."""
        value, delta = base, None
        if contribution.replacement is not None:
            value = self._rows_of(contribution.replacement, contribution, begin, end)
            delta = value - base
        for site in contribution.biases:
            raw = {name: ref.read(contribution.adapters.tensors, self.compute) for name, ref in site.params.items()}
            changed = site.method.effective_bias(raw, value.reshape(-1), None, site.layer).reshape(value.shape)
            delta = changed - value if delta is None else delta + (changed - value)
            value = changed
        for part in contribution.parts:
            update = self._update(part, value, begin, end)
            value = value + update
            delta = update if delta is None else delta + update
        return value, np.zeros_like(base) if delta is None else delta

    def _update(self, part: Part, value: np.ndarray, begin: int, end: int) -> np.ndarray:
        site, piece = part.site, part.piece
        p = self.prepared()[id(site)]
        start = piece.start + begin - piece.at
        if site.row_axis in site.method.tiles.split():
            p = site.method.cut(p, site.layer, site.row_axis, start, start + end - begin)
        w = value.T if site.layer.transposed else value
        update = site.method.update(p, w, site.layer)
        return update.T if site.layer.transposed else update

    def _rows_of(self, ref: Ref, contribution: Contribution, begin: int, end: int) -> np.ndarray:
        tensors = contribution.adapters.tensors
        info = tensors[ref.name]
        stored = np.empty((end - begin, self.output.columns), info.dtype.numpy)
        offset = info.begin + begin * self.output.columns * stored.dtype.itemsize
        tensors.shard_of(ref.name).read_into(stored, offset)
        return decode(stored, info.dtype).astype(self.compute, copy=False)

    def _measure(
        self, stored: np.ndarray, base: np.ndarray, delta: np.ndarray, rounded: np.ndarray, scratch: Scratch
    ) -> Sums:
        error = decode(rounded, self.target, scratch.array("error", base.shape, self.compute))
        with np.errstate(invalid="ignore", over="ignore"):
            error -= base
            error -= delta
            flat = [array.reshape(-1) for array in (base, np.ascontiguousarray(delta), error)]
            sums = Sums(
                count=base.size,
                base=_dot(flat[0], flat[0]),
                update=_dot(flat[1], flat[1]),
                rounding=_dot(flat[2], flat[2]),
                cross=_dot(flat[1], flat[2]),
            )
        if stored.dtype == rounded.dtype:
            bits = np.dtype(f"u{stored.dtype.itemsize}")
            sums.unchanged = int(np.count_nonzero(stored.view(bits) == rounded.view(bits)))
        else:
            sums.unchanged = int(np.count_nonzero(error + delta == 0))
        if not np.isfinite(sums.rounding):
            sums = self._with_nonfinite(sums, base, delta, rounded)
        return sums

    def _with_nonfinite(self, sums: Sums, base: np.ndarray, delta: np.ndarray, rounded: np.ndarray) -> Sums:
        """Sums over the finite entries; entries that the base has not finite either are counted, new ones are an error."""
        written = decode(rounded, self.target).astype(np.float64)
        before, bad = np.isfinite(base), ~np.isfinite(written)
        if (bad & before).any():
            message = (
                f"{self.output.name}: {int((bad & before).sum())} entries overflow {self.output.code} (the "
                f"largest is {float(np.abs(base + delta)[before].max()):.3g}); write a wider dtype (--dtype "
                "bfloat16 or float32), or lower the scale"
            )
            raise NumberError(message)
        w, d = (np.where(bad, 0, array).astype(np.float64).reshape(-1) for array in (base, delta))
        e = np.where(bad, 0, written).reshape(-1) - w - d
        return Sums(sums.count, w @ w, d @ d, e @ e, d @ e, sums.unchanged, int(bad.sum()))


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a, b))
