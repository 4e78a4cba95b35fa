"""Carry out an encoded weight: merge all of it in float32, quantise it, and measure what became of the update."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from peftarray.errors import NumberError, UnsupportedError
from peftarray.merging.contributions import Segment
from peftarray.merging.encoded import Encoded
from peftarray.merging.origin import taking
from peftarray.merging.placement import Placement
from peftarray.merging.report import Sums
from peftarray.merging.shard_file import ShardFile
from peftarray.merging.tile import TILE, Scratch, SegmentMerger, can_tile, rows_in

if TYPE_CHECKING:
    from peftarray.quant import Codec

__all__ = ["codes_changed", "write_encoded"]


def write_encoded(encoded: Encoded, target: ShardFile, scratch: Scratch, place: Placement) -> Sums:
    """Write a weight's tensors, and sum up what was done.

    A codec may need the whole weight at once (quantised scales need the mean of them all), so this holds it in float32.

    Raises:
        NumberError: a number is not finite.
    """
    merged = _merged(encoded, scratch, place)
    try:
        written = encoded.encode(merged)
    except NumberError as error:
        message = f"{encoded.name}: {error}"
        raise NumberError(message) from None
    for info in encoded.tensors:
        array = np.ascontiguousarray(written[info.name]).reshape(-1)
        if array.nbytes != info.nbytes:
            message = f"{info.name} takes {array.nbytes} bytes where {info.nbytes} were planned; report this"
            raise UnsupportedError(message)
        target.write(array.view(np.uint8).data, info.begin)
        target.begin_writing_back(info.begin, info.nbytes)
    return _measured(encoded, merged, written)


def _merged(encoded: Encoded, scratch: Scratch, place: Placement) -> np.ndarray:
    columns = encoded.columns
    count = encoded.entries // columns if columns else 0
    merged = np.empty((count, columns), np.float32)
    for segment in encoded.segments or (Segment(0, count, ()),):
        merger = SegmentMerger(encoded, segment, place) if segment.contributions else None
        step = _step(encoded, merger, segment)
        for begin in range(segment.begin, segment.end, step):
            end = min(begin + step, segment.end)
            with encoded.origin.rows(begin, end, columns) as take:
                if merger is None:
                    merged[begin:end] = take(begin, end)
                else:
                    merger.merge(take(begin, end), begin, merged[begin:end], scratch)
    return merged


def _step(encoded: Encoded, merger: SegmentMerger | None, segment: Segment) -> int:
    if not can_tile(segment):
        return max(1, segment.end - segment.begin)
    step = merger.row_step() if merger is not None else encoded.origin.row_step(encoded.columns)
    return rows_in(TILE, encoded.columns, step)


def _measured(encoded: Encoded, merged: np.ndarray, written: dict[str, np.ndarray]) -> Sums:
    """The figures over all entries, of what a reader decodes; the update is what float32 holds of it."""
    columns, total = encoded.columns, Sums()
    weight = encoded.stored(written)
    parts = weight.parts(written.__getitem__)
    decode = taking(weight, parts, columns)
    step = rows_in(TILE, columns, encoded.origin.row_step(columns))
    for begin in range(0, len(merged), step):
        end = min(begin + step, len(merged))
        with encoded.origin.rows(begin, end, columns) as take:
            base = take(begin, end).astype(np.float32)
        got = decode(begin, end)
        wanted, error = merged[begin:end] - base, got - merged[begin:end]
        sums = Sums(count=base.size, measured=base.size)
        sums.base, sums.update = _inner(base, base), _inner(wanted, wanted)
        sums.wanted, sums.rounding, sums.cross = sums.update, _inner(error, error), _inner(wanted, error)
        total.add(sums)
    total.unchanged = float(total.count)
    if encoded.before is not None:
        before = encoded.before.weight
        old = before.parts(encoded.before.checkpoint.read_stored)["codes"]
        total.unchanged -= codes_changed(old, parts["codes"], encoded.entries, _code_bits(weight.codec))
    return total


def codes_changed(before: np.ndarray, after: np.ndarray, count: int, bits: int) -> int:
    """How many of `count` numbers have other codes of so many bits, wherever in bytes or words these lie.

    Example:
        >>> codes_changed(np.uint8([0x12, 0x34]), np.uint8([0x13, 0x34]), 4, 4)
        1
    """
    if before.dtype != after.dtype or before.shape != after.shape:
        return count
    old, new = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (before, after))
    changed = old ^ new
    if bits in (1, 2, 4, 8):
        masks = [np.uint8(((1 << bits) - 1) << at) for at in range(0, 8, bits)]
        return sum(int(np.count_nonzero(changed & mask)) for mask in masks)
    # Codes that go on in the next byte lie in rows of whole words, lowest bits first.
    rows = changed.reshape(len(before), -1)
    used = count // len(before) * bits
    return sum(int(np.unpackbits(row, bitorder="little")[:used].reshape(-1, bits).any(axis=1).sum()) for row in rows)


def _code_bits(codec: Codec) -> int:
    shape = (32, 4096)  # a whole number of groups and words for every codec
    return codec.parts(shape)["codes"].nbytes * 8 // math.prod(shape)


def _inner(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a.reshape(-1), b.reshape(-1)))
