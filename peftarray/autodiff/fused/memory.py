"""Passes over memory: written into arrays that are there, and made tile by tile while a tile is in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from peftarray.arrays import Array

__all__ = ["into", "row_max", "tiles"]

# Entries in a tile: several arrays of so many float32 fit into a core's second cache.
_TILE = 1 << 15


def into(out: Array, function: Callable[..., Array], *arguments: Any) -> None:
    """`out[...] = function(*arguments)`, without an array in between where the library's functions are ufuncs."""
    if hasattr(function, "nin"):
        function(*arguments, out=out)
    else:
        out[...] = function(*arguments)


def row_max(xp: Any, x: Array) -> Array:
    """The maxima along the last axis, as a column: by their places, which NumPy finds in half the time."""
    return xp.take_along_axis(x, xp.argmax(x, axis=-1, keepdims=True), axis=-1)


def tiles(xp: Any, *arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Blocks of rows of arrays that have as many: views of those that lie in one piece, as new arrays do.

    On another device than the host all rows are one block, since each step there has a price of its own.
    """
    shape = arrays[0].shape or (1,)
    count = math.prod(shape[:-1])
    flat = [xp.reshape(array, (count, *(array.shape[-1:] or (1,)))) for array in arrays]
    step = max(1, _TILE // max(1, shape[-1]) if isinstance(flat[0], np.ndarray) else count)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        yield tuple(array[part, :] for array in flat)
