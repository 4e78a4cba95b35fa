"""Tables: from codes to the numbers that they stand for, and from numbers to the codes that are nearest.

NumPy is quick at neither by itself, so there is a way of its own for both: several codes at a time by one wide table,
and comparisons over blocks that stay in the cache in place of a search.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from peftarray.arrays import Array, constant, device, namespace

__all__ = ["CACHED", "ByteTable", "count_above", "host_table"]

CACHED = 1 << 15
"""So many numbers, and a few arrays as large, stay in a core's cache."""
_FEW = 16
_WIDE = {2: np.dtype(np.float64), 4: np.dtype(np.complex128), 8: np.dtype("V32")}


@dataclass(frozen=True, eq=False)
class ByteTable:
    """What each of the 256 bytes stands for.

    Attributes:
        values: `(256, k)` float32: the `k` numbers that a byte holds, in order.
    """

    values: np.ndarray

    @property
    def width(self) -> int:
        """How many numbers a byte holds."""
        return int(self.values.shape[1])

    def expand(self, codes: Array) -> Array:
        """The numbers of bytes `(n,)`, one after the other: `(n * k,)` float32."""
        if isinstance(codes, np.ndarray):
            result = np.empty(codes.size * self.width, np.float32)
            self.expand_into(codes, result)
            return result
        xp = namespace(codes)
        table = xp.asarray(self.values, dtype=xp.float32, device=device(codes))
        return xp.reshape(xp.take(table, xp.astype(codes, xp.int32), axis=0), (-1,))

    def expand_into(self, codes: np.ndarray, out: np.ndarray) -> None:
        """The same for NumPy, in place; `out` may end within the last byte. Two bytes are one step."""
        codes = np.ascontiguousarray(codes)
        if codes.ctypes.data % 2:  # as in a file whose header ends anywhere; a copy is the smaller evil
            codes = codes.copy()
        even = out.size // (2 * self.width) * 2 if sys.byteorder == "little" else 0
        if even:
            wide = self._wide
            # "clip" spares the check of the indices, none of which can be out of bounds.
            np.take(wide, codes[:even].view(np.uint16), out=out[: even * self.width].view(wide.dtype), mode="clip")
        if even < codes.size:
            rest = out[even * self.width :]
            rest[...] = self.values[codes[even:]].reshape(-1)[: rest.size]

    @cached_property
    def _wide(self) -> np.ndarray:
        """What two bytes stand for, as elements of a dtype so wide: NumPy copies one by an instruction or two."""
        pairs = np.arange(1 << 16)
        both = np.concatenate([self.values[pairs & 255], self.values[pairs >> 8]], axis=1)
        return both.view(_WIDE[both.shape[1]])[:, 0]


def count_above(values: Array, thresholds: np.ndarray) -> Array:
    """For each number, how many of the ascending thresholds lie below it: uint8, in the shape of `values`.

    Args:
        values: float32 numbers.
        thresholds: at most 255 float32 numbers.
    """
    xp = namespace(values)
    if isinstance(values, np.ndarray) and len(thresholds) <= _FEW:
        return _count_on_host(values, thresholds)
    if isinstance(values, np.ndarray):
        return np.searchsorted(thresholds, values).astype(np.uint8)
    flat = xp.reshape(values, (-1,))
    found = xp.searchsorted(constant(thresholds, flat), flat)
    return xp.reshape(xp.astype(found, xp.uint8), values.shape)


def _count_on_host(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    counts = np.zeros(values.shape, np.uint8)
    above = np.empty(values.shape, np.bool_)
    for threshold in thresholds:
        np.greater(values, threshold, out=above)
        np.add(counts, above.view(np.uint8), out=counts)
    return counts


def host_table(values: np.ndarray, like: Array) -> Array:
    """A small table of uint8 codes as an array of the library and device of `like`."""
    xp = namespace(like)
    return xp.asarray(values, dtype=xp.uint8, device=device(like))
