"""What is left out by size: the smallest entries, or the smallest and the largest.

Sources: Yadav et al., TIES-Merging, 2023, section 4 ("trim"), arXiv:2306.01708; Davari and Belilovsky, Model
Breadcrumbs, 2023, section 3, arXiv:2312.06795.
"""

from __future__ import annotations

import math

from peftarray.arrays import Array, namespace

__all__ = ["largest", "prune", "without_outliers"]


def largest(x: Array, count: int) -> Array:
    """Which `count` entries of `x` have the largest magnitudes; of equal ones, those that come first.

    Example:
        >>> import numpy as np
        >>> largest(np.array([1.0, -3.0, 3.0, 2.0]), 2).tolist()
        [False, True, True, False]
    """
    xp = namespace(x)
    size = math.prod(x.shape)
    if count <= 0 or count >= size:
        return xp.zeros_like(x, dtype=xp.bool) if count <= 0 else xp.ones_like(x, dtype=xp.bool)
    flat = xp.reshape(xp.abs(x), (-1,))
    bound = xp.sort(flat)[size - count]
    above, level = flat > bound, xp.astype(flat == bound, xp.int32)
    room = count - xp.sum(xp.astype(above, xp.int32))
    return xp.reshape(above | ((level == 1) & (xp.cumulative_sum(level) <= room)), x.shape)


def prune(x: Array, density: float) -> Array:
    """`x` with the share `density` of its entries, those of the largest magnitudes, and zeros elsewhere."""
    return x * _as(largest(x, int(density * math.prod(x.shape))), x)


def without_outliers(x: Array, density: float, gamma: float) -> Array:
    """`x` with the share `density` of its entries, the largest but for the share `gamma` above them, and zeros."""
    size = math.prod(x.shape)
    outliers = int(gamma * size)
    return x * (_as(largest(x, outliers + int(density * size)), x) - _as(largest(x, outliers), x))


def _as(mask: Array, like: Array) -> Array:
    return namespace(mask).astype(mask, like.dtype)
