"""The numbers that codes of four and eight bits stand for, and where one code ends and the next begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import ml_dtypes
import numpy as np

from peftarray.dtypes import storage_dtype
from peftarray.quant.lookup import ByteTable

__all__ = [
    "DYNAMIC",
    "E2M1_PAIRS",
    "E2M1_THRESHOLDS",
    "FP4",
    "NF4",
    "POWERS",
    "Codebook",
    "float8",
    "float8_table",
    "float8_thresholds",
    "nearest_dynamic",
]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Numbers from -1 to 1 by code.

    Attributes:
        values: float32, the number of each code.
        order: the codes by ascending number.
    """

    values: np.ndarray
    order: np.ndarray

    @cached_property
    def thresholds(self) -> np.ndarray:
        """The midpoints between neighbours: a number on one of them goes to the lower neighbour."""
        ascending = self.values[self.order]
        return (ascending[:-1] + ascending[1:]) / np.float32(2)

    @cached_property
    def pairs(self) -> ByteTable:
        """What a byte of two codes stands for, the high half first."""
        codes = np.arange(256)
        return ByteTable(np.stack([self.values[codes >> 4], self.values[codes & 15]], axis=1))

    @cached_property
    def packed_order(self) -> np.ndarray | None:
        """A byte of two positions in `order` to the byte of the two codes; None where they are the same."""
        if np.array_equal(self.order, np.arange(16)):
            return None
        positions = np.arange(256)
        return (self.order[positions >> 4] << 4 | self.order[positions & 15]).astype(np.uint8)


_NORMAL = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
# A sign and three bits, in twelfths.
_TWELFTHS = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32)

NF4 = Codebook(_NORMAL, np.arange(16, dtype=np.uint8))
"""Quantiles of the normal distribution (Dettmers et al., QLoRA, 2023, section 3, arXiv:2305.14314)."""
FP4 = Codebook(_TWELFTHS / np.float32(12), np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8))
"""bitsandbytes' own float of four bits, which is not the OCP standard's."""


def _even_steps(count: int) -> np.ndarray:
    """From 0.1 to 1 in `count` numbers as torch's `linspace` rounds them: from both ends to the middle."""
    first, last = np.float32(0.1), np.float32(1)
    step = float((last - first) / np.float32(count - 1))
    places = np.arange(count)
    rising = float(first) + step * places
    falling = float(last) - step * (count - 1 - places)
    return np.where(places < count // 2, rising, falling).astype(np.float32)


def _dynamic() -> np.ndarray:
    """For each power of ten down to 1e-6, the middles of half as many steps; their negatives; 0 and 1."""
    found: list[np.ndarray] = [np.array([0, 1], np.float32)]
    for exponent in range(7):
        steps = _even_steps(2**exponent + 1)
        middles = np.float32(10.0 ** (exponent - 6)) * ((steps[:-1] + steps[1:]) / np.float32(2))
        found += [middles, -middles]
    return np.sort(np.concatenate(found))


DYNAMIC = Codebook(_dynamic(), np.arange(256, dtype=np.uint8))
"""bitsandbytes' code of eight bits (Dettmers, 8-Bit Approximations for Parallelism, 2016, arXiv:1511.04561)."""


@cache
def nearest_dynamic() -> np.ndarray:
    """The code of `DYNAMIC` nearest to each of 65,536 even steps from -1 to 1: how bitsandbytes looks it up."""
    steps = np.float32(-1) + np.float32(2) * np.arange(1 << 16, dtype=np.float32) / np.float32((1 << 16) - 1)
    return np.searchsorted(DYNAMIC.thresholds, steps).astype(np.uint8)


@cache
def float8_table(dtype: str) -> ByteTable:
    """What each byte means as a float of eight bits, by the name that safetensors gives its dtype."""
    return ByteTable(np.arange(256, dtype=np.uint8).view(float8(dtype)).astype(np.float32)[:, None])


@cache
def float8_thresholds(dtype: str) -> np.ndarray:
    """The largest magnitude that rounds to each code of a float8, but the last that is finite."""
    kind = float8(dtype)
    last = ml_dtypes.finfo(kind).max.view(np.uint8)
    return _rounding(np.arange(last + 1, dtype=np.uint8).view(kind).astype(np.float32))


def _rounding(ascending: np.ndarray) -> np.ndarray:
    """The largest number that rounds down to each code: a tie goes to the even one."""
    middles = (ascending[:-1] + ascending[1:]) / np.float32(2)
    odd = np.arange(len(middles)) % 2 == 1
    return np.where(odd, np.nextafter(middles, np.float32(0)), middles)


def float8(dtype: str) -> np.dtype:
    """The dtype of ml_dtypes that safetensors names so."""
    known = storage_dtype(dtype)
    assert known is not None
    assert known.numpy is not None
    return known.numpy


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E2M1_THRESHOLDS = _rounding(_E2M1[:8])
"""The largest magnitude that rounds to each of the first seven codes of the OCP standard's float of four bits."""
E2M1_PAIRS = ByteTable(np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1))
"""What a byte of two such floats stands for, the low half first."""
POWERS = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
"""The powers of two that float32 holds in full precision."""
