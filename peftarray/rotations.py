"""Rotations of many coordinates, block by block: from skew-symmetric blocks to orthogonal ones, to rows turned by them.

A stack of blocks `(n / b, b, b)` stands for the matrix `(n, n)` with them on its diagonal, which is never made; a stack
of one block, `(1, b, b)`, for the same block all along the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from peftarray.arrays import Array, device, integers, namespace

__all__ = ["cayley", "diagonal_blocks", "skew_symmetric", "turn", "wide"]

# Products with smaller blocks than this take longer: the overhead of a block outweighs its arithmetic.
_WIDE = 32


def skew_symmetric(vectors: Array, size: int) -> Array:
    """`K (R, b, b)` with `K = -K.mT` and `b = size`, from what is above the diagonals by rows: `(R, b (b - 1) / 2)`.

    Example:
        >>> import numpy as np
        >>> skew_symmetric(np.asarray([[1.0, 2.0, 3.0]]), 3)[0]
        array([[ 0.,  1.,  2.],
               [-1.,  0.,  3.],
               [-2., -3.,  0.]])
    """
    xp = namespace(vectors)
    stack = vectors.shape[0]
    diagonal = xp.zeros((stack, 1), dtype=vectors.dtype, device=device(vectors))
    entries = xp.concat([vectors, -vectors, diagonal], axis=1)
    return xp.reshape(xp.take(entries, integers(_places(size), vectors), axis=1), (stack, size, size))


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
    return size * max([1, *(times for times in range(1, _WIDE // size + 1) if n // size % times == 0)])


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


@lru_cache(maxsize=16)
def _places(size: int) -> np.ndarray:
    """Where an entry of a skew-symmetric block stands among those above the diagonal, their negatives, and a zero."""
    row, column = np.triu_indices(size, 1)
    place = np.full((size, size), 2 * len(row))
    place[row, column] = np.arange(len(row))
    place[column, row] = np.arange(len(row)) + len(row)
    return place.reshape(-1)
