"""Reading entries by their places."""

from __future__ import annotations

import math
from types import EllipsisType
from typing import Any

from peftarray.arrays import Array, device
from peftarray.autodiff.rules.family import Family, Needs, Result, Wanted
from peftarray.autodiff.rules.scatter import add_rows, put_along_axis

__all__ = ["INDEXING"]

INDEXING = Family()


@INDEXING.rule("getitem")
def _getitem(xp: Any, needs: Needs, x: Array, key: Any, /) -> Result:
    """`x[key]`: by integers, slices, an ellipsis, None, arrays of integers, or a mask, as far as the library does."""
    shape = x.shape
    parts = key if isinstance(key, tuple) else (key,)

    def assign(g: Array) -> Wanted:
        total = xp.zeros(shape, dtype=g.dtype, device=device(g))
        if any(part is None for part in parts):  # the standard assigns to no new axes
            place = tuple(part for part in parts if part is not None) or (...,)
            total[place] = xp.reshape(g, total[place].shape)
        else:
            total[key] = g
        return (total,)

    def add_whole_rows(g: Array) -> Wanted:
        rows = xp.reshape(g, (-1, *shape[1:]))
        return (add_rows(xp, rows, xp.reshape(key, (-1,)), shape[0]),)

    def add_entries(g: Array) -> Wanted:
        size = math.prod(shape)
        places = xp.reshape(xp.arange(size, device=device(g)), shape)[key]
        total = add_rows(xp, xp.reshape(g, (-1,)), xp.reshape(places, (-1,)), size)
        return (xp.reshape(total, shape),)

    # None of these reads an entry twice.
    if all(isinstance(part, (int, slice, EllipsisType, type(None))) or _is_mask(xp, part) for part in parts):
        return x[key], assign
    return x[key], add_entries if isinstance(key, (tuple, list)) else add_whole_rows


def _is_mask(xp: Any, part: Any) -> bool:
    return getattr(part, "dtype", None) == xp.bool


@INDEXING.rule("take")
def _take(xp: Any, needs: Needs, x: Array, indices: Array, axis: int | None = None) -> Result:
    """`indices` may have any number of axes, as far as the library takes them."""
    indices = xp.asarray(indices) if isinstance(indices, (int, list, tuple)) else indices
    before = x.shape
    shape = before if axis is not None else (math.prod(before),)
    along = 0 if axis is None else axis % len(before)

    def pull(g: Array) -> Wanted:
        inner = range(along, along + indices.ndim)
        order = (*inner, *(i for i in range(g.ndim) if i not in inner))
        rows = xp.reshape(xp.permute_dims(g, order), (-1, *shape[:along], *shape[along + 1 :]))
        total = add_rows(xp, rows, xp.reshape(indices, (-1,)), shape[along])
        back = (*range(1, along + 1), 0, *range(along + 1, len(shape)))
        return (xp.reshape(xp.permute_dims(total, back), before),)

    return xp.take(x, indices, axis=axis), pull


@INDEXING.rule("take_along_axis")
def _take_along_axis(xp: Any, needs: Needs, x: Array, indices: Array, axis: int = -1) -> Result:
    shape = x.shape
    return (
        xp.take_along_axis(x, indices, axis=axis),
        lambda g: (put_along_axis(xp, shape, indices, g, axis),),
    )
