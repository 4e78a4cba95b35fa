"""Blocks of a flat weight, each with the largest magnitude in it: what block-wise codecs share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from peftarray.arrays import Array, device, namespace
from peftarray.errors import NumberError
from peftarray.quant.codebooks import DYNAMIC, nearest_dynamic
from peftarray.quant.lookup import CACHED, ByteTable, host_table

__all__ = [
    "absmax_of",
    "block_count",
    "dequantize_dynamic",
    "expand_scaled",
    "finite",
    "flat",
    "map_blocks",
    "mean_in_order",
    "quantize_dynamic",
    "reciprocals",
    "rows_between_blocks",
    "scaled",
    "tiles",
]

_TILE = 1 << 19  # smaller ones stay in a nearer cache, but threads then wait for the interpreter's lock
_SMALLEST = 2.9388e-39  # whose reciprocal is still finite in float32
_LANES = 8  # of the vectors that torch adds, four of them at a time
_DYNAMIC_BYTES = ByteTable(DYNAMIC.values[:, None])


def block_count(count: int, block: int) -> int:
    """Blocks of `count` numbers; the last may be shorter."""
    return -(-count // block)


def flat(weight: Array) -> Array:
    """The numbers of a weight in their order."""
    return namespace(weight).reshape(weight, (-1,))


def tiles(count: int, step: int, *, most: int = CACHED) -> Iterator[slice]:
    """Slices of whole steps, of at most `most` numbers where a step has no more: they stay in the cache."""
    size = max(1, most // step) * step
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def rows_between_blocks(shape: tuple[int, ...], block: int) -> int:
    """After so many rows a row begins with a block again."""
    return block // math.gcd(block, max(1, math.prod(shape[1:])))


def absmax_of(values: Array, block: int) -> Array:
    """The largest magnitude of each block of `(n,)` numbers.

    Raises:
        NumberError: one of them is not a finite number.
    """
    if isinstance(values, np.ndarray):
        starts = np.arange(0, values.size, block)
        return finite(np.maximum.reduceat(np.abs(values), starts) if values.size else values)
    xp = namespace(values)
    return finite(xp.max(xp.abs(_in_blocks(values, block)), axis=1))


def finite(absmax: Array) -> Array:
    """The same largest magnitudes, which NaN and infinity pass through, if they are numbers.

    Raises:
        NumberError: one of them is not.
    """
    xp = namespace(absmax)
    if not bool(xp.all(xp.isfinite(absmax))):
        message = "a weight holds NaN or infinity, which no code stands for; repair it before it is quantised"
        raise NumberError(message)
    return absmax


def reciprocals(absmax: Array, smallest: float) -> Array:
    """`1 / absmax`; where that is `smallest` or less, and might overflow, `1 / smallest`."""
    xp = namespace(absmax)
    tiny = absmax <= smallest
    most = float(np.float32(1) / np.float32(smallest))
    return xp.where(tiny, xp.full_like(absmax, most), 1 / xp.where(tiny, xp.ones_like(absmax), absmax))


def scaled(values: Array, scales: Array, block: int, *, out: np.ndarray | None = None) -> Array:
    """Each block of `(n,)` numbers times its scale; with NumPy also into `out`, which may be `values`."""
    if isinstance(values, np.ndarray):
        product = np.empty_like(values) if out is None else out
        whole = values.size // block
        inner = whole * block
        np.multiply(
            values[:inner].reshape(whole, block), scales[:whole, None], out=product[:inner].reshape(whole, block)
        )
        if inner < values.size:
            np.multiply(values[inner:], scales[whole], out=product[inner:])
        return product
    xp = namespace(values)
    product = _in_blocks(values, block) * xp.expand_dims(scales, axis=1)
    return xp.reshape(product, (-1,))[: values.shape[0]]


def expand_scaled(
    table: ByteTable, codes: Array, scales: Array, block: int, count: int, *, out: np.ndarray | None = None
) -> Array:
    """The first `count` numbers of bytes `(n,)`, each block times its scale: float32; with NumPy also into `out`."""
    if not isinstance(codes, np.ndarray):
        return scaled(table.expand(codes)[:count], scales, block)
    result = np.empty(count, np.float32) if out is None else out
    width, held = table.width, np.empty(0, np.float32)
    for tile in tiles(count, math.lcm(block, width), most=_TILE):
        # Expanded in memory that stays in the cache: a lookup holds the interpreter's lock, which is no time to wait
        # for new memory; a product does not.
        held = held if held.size else np.empty(tile.stop, np.float32)
        some = held[: tile.stop - tile.start]
        table.expand_into(codes[tile.start // width : -(-tile.stop // width)], some)
        scaled(some, scales[tile.start // block : block_count(tile.stop, block)], block, out=result[tile])
    return result


def _in_blocks(values: Array, block: int) -> Array:
    """`(n,)` numbers as `(blocks, block)`, the last block filled up with zeros."""
    xp = namespace(values)
    missing = -values.shape[0] % block
    if missing:
        values = xp.concat([values, xp.zeros((missing,), dtype=values.dtype, device=device(values))])
    return xp.reshape(values, (-1, block))


def map_blocks(values: Array, step: int, make: Callable[[Array], tuple[Array, ...]]) -> tuple[Array, ...]:
    """What `make` makes of `(n,)` numbers in float32, tile by tile for NumPy: arrays along the same axis.

    Args:
        values: floating numbers of any dtype.
        step: tiles are whole multiples of it, but for the last.
        make: a tile of float32 numbers to new arrays.
    """
    xp = namespace(values)
    if not isinstance(values, np.ndarray):
        return make(xp.astype(values, xp.float32))
    made = [make(values[tile].astype(np.float32, copy=False)) for tile in tiles(values.size, step)]
    if len(made) == 1:
        return made[0]
    if not made:
        return make(values.astype(np.float32))
    return tuple(np.concatenate(same) for same in zip(*made, strict=True))


def quantize_dynamic(values: Array, block: int) -> tuple[Array, Array]:
    """Codes of eight bits, uint8, and the largest magnitude of each block.

    bitsandbytes multiplies by the reciprocal and takes the nearest of 65,536 even steps first, which is not always the
    nearest code; so does this, to the bit.
    """

    def make(tile: Array) -> tuple[Array, Array]:
        xp = namespace(tile)
        absmax = absmax_of(tile, block)
        unit = scaled(tile, reciprocals(absmax, _SMALLEST), block)
        places = xp.astype((unit + 1) * 32767.5 + 0.5, xp.int32)
        codes = xp.take(host_table(nearest_dynamic(), tile), places, axis=0)
        # A block of zeros has code 0 throughout.
        return scaled(codes, xp.astype(absmax > 0, xp.uint8), block), absmax

    codes, absmax = map_blocks(values, block, make)
    return codes, absmax


def dequantize_dynamic(
    codes: Array, absmax: Array, block: int, values: Array | None = None, *, out: np.ndarray | None = None
) -> Array:
    """`(n,)` codes of eight bits as numbers; `values` are the 256 that a file brings, bitsandbytes' if None.

    The latter, with NumPy, also into `out`.
    """
    if values is None:
        return expand_scaled(_DYNAMIC_BYTES, codes, absmax, block, codes.shape[0], out=out)
    xp = namespace(codes)
    return scaled(xp.take(xp.astype(values, xp.float32), xp.astype(codes, xp.int32), axis=0), absmax, block)


def mean_in_order(values: Array) -> Array:
    """The mean of `(n,)` float32 numbers, added in the order in which torch adds them on one thread.

    Sums of floats depend on their order; bitsandbytes' statistics come out to the bit only in this one: 32 columns,
    each in up to four levels of partial sums, then the columns, then what is left over.
    """
    xp = namespace(values)
    count = values.shape[0]
    lanes = _LANES if count >= _LANES else 1
    rows, whole = count // (4 * lanes), count // lanes * lanes
    sums = _in_levels(xp.reshape(values[: rows * 4 * lanes], (rows, 4, lanes)))
    total = _in_turn(xp.reshape(values[rows * 4 * lanes : whole], (-1, lanes)), sums[0, :])
    for group in range(1, 4):
        total = total + sums[group, :]
    rest = _in_turn(values[whole:])
    return _in_turn(total, rest) / count


def _in_levels(rows: Array) -> Array:
    """`(n, ...)` added over the first axis: runs of 2**p, runs of these, ... up to the fourth level, then the rests."""
    xp = namespace(rows)
    count = rows.shape[0]
    step = 1 << max(4, (count - 1).bit_length() // 4 if count > 1 else 0)
    rests = []
    for _ in range(3):
        whole = rows.shape[0] // step * step
        rests.append(_in_turn(rows[whole:, ...]))
        runs = xp.reshape(rows[:whole, ...], (-1, step, *rows.shape[1:]))
        rows = _in_turn(xp.permute_dims(runs, (1, 0, 2, 3)))
    rests.append(_in_turn(rows))
    total = rests[0]
    for rest in rests[1:]:
        total = total + rest
    return total


def _in_turn(rows: Array, first: Array | None = None) -> Array:
    """`(n, ...)` added over the first axis, one after the other, to `first` or to zero."""
    xp = namespace(rows)
    total = xp.zeros(rows.shape[1:], dtype=rows.dtype, device=device(rows)) if first is None else first
    for place in range(rows.shape[0]):
        total = total + rows[place, ...]
    return total
