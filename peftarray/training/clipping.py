"""Gradients made shorter before a step: by the length of all of them together, or entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from peftarray import trees
from peftarray.arrays import Array, namespace, wide

__all__ = ["clip_by_norm", "clip_by_value", "global_norm"]


def global_norm(gradients: Any) -> Array:
    """The Euclidean norm of all entries of a tree: an array without axes, float32 at least. None counts for nothing."""
    squares = [_square(array) for array in trees.leaves(gradients) if array is not None]
    xp = namespace(*squares)
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    return xp.asarray(xp.sqrt(total))


def clip_by_norm(gradients: Any, limit: float, *, norm: Array | None = None) -> tuple[Any, Array]:
    """The gradients, shorter by one factor if their norm is above `limit`; and the norm that they had.

    Args:
        gradients: a tree of arrays.
        limit: of the norm.
        norm: what `global_norm` gives, where it is known already.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks, 2013, algorithm 1, arXiv:1211.5063.

    Example:
        >>> import numpy as np
        >>> clipped, norm = clip_by_norm({"a": np.asarray([3.0]), "b": np.asarray([4.0])}, 1.0)
        >>> clipped["a"].round(3).tolist(), float(norm)
        ([0.6], 5.0)
    """
    norm = global_norm(gradients) if norm is None else norm
    factor = namespace(norm).clip(limit / (norm + 1e-6), max=1.0)

    def shorter(array: Array) -> Array:
        return array * namespace(array).asarray(factor, dtype=array.dtype)

    return _each(shorter, gradients), norm


def clip_by_value(gradients: Any, limit: float) -> Any:
    """The gradients, with every entry moved into `[-limit, limit]`."""

    def bounded(array: Array) -> Array:
        return namespace(array).clip(array, min=-limit, max=limit)

    return _each(bounded, gradients)


def _each(change: Callable[[Array], Array], gradients: Any) -> Any:
    return trees.refill(gradients, [None if array is None else change(array) for array in trees.leaves(gradients)])


def _square(array: Array) -> Array:
    xp = namespace(array)
    flat = xp.reshape(xp.astype(array, wide(array).dtype, copy=False), (math.prod(array.shape),))
    return xp.asarray(xp.vecdot(flat, flat))
