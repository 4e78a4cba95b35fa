"""Adding rows at places that may repeat: what the standard lacks, and every gradient of an index needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from peftarray.arrays import Array, device

__all__ = ["add_rows", "put_along_axis"]

# Where a library cannot add at places, one-hot matrices of so many entries stand in.
_ONE_HOT = 1 << 24


def add_rows(xp: Any, rows: Array, places: Array, count: int) -> Array:
    """`(count, ...)` with each of `rows (n, ...)` added at its place; `places (n,)` may be negative, and repeat."""
    shape = (count, *rows.shape[1:])
    places = xp.where(places < 0, places + count, places)
    if isinstance(rows, np.ndarray) and rows.ndim > 1:
        return _add_sorted(rows, places, shape)
    total = xp.zeros(shape, dtype=rows.dtype, device=device(rows))
    add_at = getattr(xp.add, "at", None)
    if add_at is not None:
        add_at(total, places, rows)
        return total
    flat = xp.reshape(rows, (rows.shape[0], -1))
    steps = xp.arange(count, device=device(rows))
    block = max(1, _ONE_HOT // max(1, count))
    total = xp.reshape(total, (count, -1))
    for start in range(0, rows.shape[0], block):
        part = slice(start, min(start + block, rows.shape[0]))
        one_hot = xp.astype(places[part][:, None] == steps, rows.dtype)
        total = total + one_hot.mT @ flat[part, :]
    return xp.reshape(total, shape)


def _add_sorted(rows: np.ndarray, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Equal places brought together and summed: a tenth of the time of adding row by row."""
    total = np.zeros(shape, rows.dtype)
    if places.size:
        order = np.argsort(places, kind="stable")
        places = places[order]
        starts = np.flatnonzero(np.concatenate([[True], places[1:] != places[:-1]]))
        total[places[starts]] = np.add.reduceat(rows[order], starts, axis=0)
    return total


def put_along_axis(xp: Any, shape: tuple[int, ...], places: Array, values: Array, axis: int) -> Array:
    """Zeros of `shape` with `values` added at `places` along `axis`: what `take_along_axis` reads, written."""
    places, values = xp.broadcast_arrays(places, values)
    axis %= len(shape)
    last = (*(i for i in range(len(shape)) if i != axis), axis)
    rest = tuple(shape[i] for i in last[:-1])
    places = xp.reshape(xp.permute_dims(places, last), (math.prod(rest), -1))
    values = xp.reshape(xp.permute_dims(values, last), (-1,))
    starts = xp.arange(math.prod(rest), dtype=places.dtype, device=device(places))[:, None] * shape[axis]
    places = xp.where(places < 0, places + shape[axis], places) + starts
    total = add_rows(xp, values, xp.reshape(places, (-1,)), math.prod(shape))
    back = tuple(last.index(i) for i in range(len(shape)))
    return xp.permute_dims(xp.reshape(total, (*rest, shape[axis])), back)
