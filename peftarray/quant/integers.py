"""Short unsigned integers packed densely into words of 32 bits, and what groups of them stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from peftarray.arrays import Array, device, namespace
from peftarray.errors import ShapeError
from peftarray.quant.blocks import tiles
from peftarray.quant.lookup import ByteTable

__all__ = [
    "by_row_tiles",
    "group_count",
    "group_index",
    "in_groups",
    "pack",
    "require_matrix",
    "transposed",
    "unpack",
    "unpack_some",
    "word_count",
]

_WORD = 32
_TILE = 1 << 16


def word_count(count: int, bits: int) -> int:
    """Words that `count` numbers of so many bits fill.

    Example:
        >>> word_count(32, 3), word_count(33, 4)
        (3, 5)
    """
    return -(-count * bits // _WORD)


def group_count(columns: int, group: int) -> int:
    """Groups of so many columns, the last of which may be shorter; 0 means that all columns are one."""
    return -(-columns // (group or max(1, columns)))


def require_matrix(shape: tuple[int, ...], kind: str, *, rows: int = 1, columns: int = 1) -> None:
    """Refuse a weight that is no matrix, or whose rows or columns are no multiple of what a format packs together.

    Raises:
        ShapeError: this shape cannot be stored so.
    """
    if len(shape) != 2 or shape[0] % rows or shape[1] % columns:
        message = (
            f"a weight of shape {shape} cannot be {kind}: it must be a matrix with a multiple of {rows} rows and of "
            f"{columns} columns"
        )
        raise ShapeError(message)


def unpack(words: Array, bits: int, count: int) -> Array:
    """The first `count` numbers along the last axis of int32 words `(..., w)`: float32, from 0 to `2**bits - 1`.

    A number begins in the lowest bits that are free, and may go on in the next word.

    Example:
        >>> unpack(np.int32([[0x21]]), 4, 3)
        array([[1., 2., 0.]], dtype=float32)
    """
    xp = namespace(words)
    if isinstance(words, np.ndarray) and bits in (2, 4, 8):
        codes = np.ascontiguousarray(words, dtype="<i4").reshape(-1).view(np.uint8)
        return _bytes(bits).expand(codes).reshape(*words.shape[:-1], -1)[..., :count]
    places = np.arange(count) * bits
    which, shift = places // _WORD, places % _WORD
    here = np.minimum(bits, _WORD - shift)  # bits of the number that this word holds
    next_word = np.minimum(which + 1, words.shape[-1] - 1)
    low = xp.take(words, _int32(which, words), axis=-1) >> _int32(shift, words) & _int32((1 << here) - 1, words)
    high = xp.take(words, _int32(next_word, words), axis=-1) & _int32((1 << bits - here) - 1, words)
    return xp.astype(low | high << _int32(here, words), xp.float32)


def unpack_some(words: Array, bits: int, begin: int, end: int) -> Array:
    """The numbers from `begin` to `end` along the last axis: only words near them are looked at."""
    first = begin // _WORD * _WORD  # with it, a word begins
    near = words[..., first * bits // _WORD : word_count(end, bits)]
    return unpack(near, bits, end - first)[..., begin - first :]


def group_index(columns: int, group: int, like: Array) -> Array | None:
    """The group of each column where the last group is shorter; None where all are of one length (0: there is one)."""
    if not group or columns % group == 0:
        return None
    return _int32(np.arange(columns) // group, like)


def pack(numbers: Array, bits: int) -> Array:
    """The reverse of `unpack`: int32 numbers `(..., n)` as words `(..., w)`; what is left of the last word is zero.

    Example:
        >>> pack(np.int32([[1, 2]]), 4)
        array([[33]], dtype=int32)
    """
    xp = namespace(numbers)
    count, lead = numbers.shape[-1], numbers.shape[:-1]
    missing = -count % _WORD
    if missing:
        zeros = xp.zeros((*lead, missing), dtype=numbers.dtype, device=device(numbers))
        numbers = xp.concat([numbers, zeros], axis=-1)
    groups = xp.reshape(numbers, (*lead, -1, _WORD))
    words = [xp.zeros_like(groups[..., 0]) for _ in range(bits)]
    for place in range(_WORD):
        which, shift = divmod(place * bits, _WORD)
        words[which] = words[which] | groups[..., place] << shift
        if shift + bits > _WORD:
            words[which + 1] = words[which + 1] | groups[..., place] >> (_WORD - shift)
    packed = xp.reshape(xp.stack(words, axis=-1), (*lead, -1))
    return packed[..., : word_count(count, bits)]


def in_groups(numbers: Array, scale: Array, zero: Array | float, *, index: Array | None = None) -> Array:
    """`(numbers - zero) * scale` of rows `(n, in)`, where each of `g` groups of columns has its own.

    Args:
        numbers: float32; NumPy's are overwritten.
        scale: `(n, g)`.
        zero: `(n, g)`, or one for all.
        index: `(in,)`, the group of each column; `g` runs of the same length if None.
    """
    xp = namespace(numbers)
    rows, width = numbers.shape
    scale = xp.astype(scale, xp.float32)
    if index is not None:
        scale = xp.take(scale, index, axis=1)
        zero = zero if isinstance(zero, float) else xp.take(zero, index, axis=1)
        return (numbers - zero) * scale
    groups = xp.reshape(numbers, (rows, scale.shape[1], -1))
    mine = zero if isinstance(zero, float) else zero[:, :, None]
    if isinstance(numbers, np.ndarray):
        np.subtract(groups, np.float32(mine) if isinstance(mine, float) else mine, out=groups)
        np.multiply(groups, scale[:, :, None], out=groups)
        return numbers
    return xp.reshape((groups - mine) * scale[:, :, None], (rows, width))


def by_row_tiles(make: Callable[[int, int], Array], begin: int, end: int, *, width: int, like: Array) -> Array:
    """The rows that `make(first, last)` makes, `(end - begin, width)`; for NumPy tile by tile, in the cache."""
    if not isinstance(like, np.ndarray):
        return make(begin, end)
    result = np.empty((end - begin, width), np.float32)
    for tile in tiles(end - begin, 1, most=max(1, _TILE // max(1, width))):
        result[tile] = make(begin + tile.start, begin + tile.stop)
    return result


def transposed(array: Array, begin: int, end: int) -> Array:
    """The columns from `begin` to `end` as rows."""
    return namespace(array).permute_dims(array[:, begin:end], (1, 0))


@cache
def _bytes(bits: int) -> ByteTable:
    """What a byte of numbers of 2, 4 or 8 bits stands for, the lowest bits first."""
    codes = np.arange(256)
    return ByteTable(np.stack([codes >> at & (1 << bits) - 1 for at in range(0, 8, bits)], axis=1).astype(np.float32))


def _int32(values: np.ndarray, like: Array) -> Array:
    xp = namespace(like)
    return xp.asarray(values.astype(np.int32), dtype=xp.int32, device=device(like))
