"""Rotations of many coordinates, block by block: from skew-symmetric blocks to orthogonal ones, to rows turned by them.

A stack of blocks `(n / b, b, b)` stands for the matrix `(n, n)` with them on its diagonal, which is never made; a stack
of one block, `(1, b, b)`, for the same block all along the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from peftarray.arrays import Array, device, namespace

__all__ = ["cayley", "diagonal_blocks", "skew_symmetric", "turn", "wide"]

# Products with smaller blocks than this take longer: the overhead of a block outweighs its arithmetic.
_WIDE = 32


def skew_symmetric(vectors: Array) -> Array:
    """`K (R, b, b)` with `K = -K.mT`, from what stands above the diagonals, row by row: `(R, b (b - 1) / 2)`.

    Example:
        >>> import numpy as np
        >>> skew_symmetric(np.asarray([[1.0, 2.0, 3.0]]))[0]
        array([[ 0.,  1.,  2.],
               [-1.,  0.,  3.],
               [-2., -3.,  0.]])
    """
    xp = namespace(vectors)
    stack, count = vectors.shape
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    row = xp.arange(size, device=device(vectors))[:, None]
    column = row.mT
    above = row * (2 * size - row - 1) // 2 + column - row - 1
    below = xp.where(row > column, count + above.mT, xp.full_like(above, 2 * count))
    place = xp.reshape(xp.where(row < column, above, below), (-1,))
    diagonal = xp.zeros((stack, 1), dtype=vectors.dtype, device=device(vectors))
    entries = xp.concat([vectors, -vectors, diagonal], axis=1)
    return xp.reshape(xp.take(entries, place, axis=1), (stack, size, size))


def cayley(skew: Array) -> Array:
    """The Cayley transform `(I - K) (I + K)^-1` of skew-symmetric blocks `(..., b, b)`: rotations."""
    xp = namespace(skew)
    one = xp.eye(skew.shape[-1], dtype=skew.dtype, device=device(skew))
    # (I - K) (I + K)^-1 = (2 I - (I + K)) (I + K)^-1
    return 2 * xp.linalg.inv(one + skew) - one


def turn(x: Array, blocks: Array) -> Array:
    """`x (..., n)` times the block-diagonal matrix of `blocks`."""
    xp = namespace(x, blocks)
    stack, size = blocks.shape[0], blocks.shape[1]
    if stack == 1:
        return xp.reshape(xp.reshape(x, (-1, size)) @ blocks[0, ...], x.shape)
    parts = xp.permute_dims(xp.reshape(x, (-1, stack, size)), (1, 0, 2)) @ blocks
    return xp.reshape(xp.permute_dims(parts, (1, 0, 2)), x.shape)


def wide(size: int, n: int) -> int:
    """The size of blocks that blocks of `size` are best joined to, on `n` coordinates."""
    times = max((times for times in range(1, _WIDE // size + 1) if n // size % times == 0), default=1)
    return times * size


def diagonal_blocks(rotate: Callable[[Array], Array], n: int, size: int, like: Array) -> Array:
    """The blocks `(n / size, size, size)` of the linear map `rotate` on rows `(..., n)`, if it has no others.

    Args:
        rotate: the map, a product with a block-diagonal matrix.
        n: how many coordinates it has.
        size: of the blocks.
        like: an array of the library, device and dtype of the result.
    """
    xp = namespace(like)
    one = xp.eye(size, dtype=like.dtype, device=device(like))
    rows = rotate(xp.tile(one, (1, n // size)))
    return xp.permute_dims(xp.reshape(rows, (size, n // size, size)), (1, 0, 2))
