"""What a codec is: settings, and pure functions between a weight and the few small arrays that it is stored as."""

from __future__ import annotations

import abc
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from peftarray.arrays import Array, Params, device, namespace
from peftarray.dtypes import storage_dtype
from peftarray.errors import ShapeError

__all__ = ["Codec", "Part", "entries", "row_size"]

# Of what a thread decodes at a time: if it is small, threads wait for each other more than they decode.
_LEAST, _MOST = 1 << 19, 1 << 22


@dataclass(frozen=True)
class Part:
    """One of the arrays that a quantised weight is stored as.

    Attributes:
        shape: its shape.
        dtype: its dtype by the name of safetensors headers, such as `"U8"`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        known = storage_dtype(self.dtype)
        assert known is not None  # codecs name dtypes that are known
        return entries(self.shape) * known.bits // 8


class Codec(abc.ABC):
    """A way to store a weight in fewer bits: a frozen dataclass of settings, with pure functions on arrays.

    It works on arrays of any library, and knows nothing of adapters, files or names. Rows are entries of the weight's
    first axis, so a weight decodes tile by tile; only the tile is ever expanded.

    Laws: `dequantize` of rows `(a, b)` is that slice of the whole; what `quantize` returns has the shapes and dtypes of
    `parts`; and a weight that came out of `dequantize` quantises to numbers that decode close to it.
    """

    kind: ClassVar[str]
    """The name in `CODECS`."""

    @abc.abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """The arrays that a weight of this shape is stored as, by name.

        Raises:
            ShapeError: no weight of this shape can be stored so.
        """

    @abc.abstractmethod
    def encode(self, weight: Array) -> dict[str, Array]:
        """The parts of a weight whose shape can be stored; `quantize` is what callers use."""

    @abc.abstractmethod
    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        """The rows from `begin` to `end` in float32, one at least, of parts that fit; callers use `dequantize`."""

    def decode_into(self, parts: Params, shape: tuple[int, ...], begin: int, end: int, out: np.ndarray) -> None:
        """The same of NumPy's parts, into memory that is there: for codecs that can write there at once."""
        out[...] = self.decode(parts, shape, begin, end)

    @final
    def quantize(self, weight: Array) -> dict[str, Array]:
        """A weight's parts, in the library and on the device of the weight.

        Args:
            weight: floating numbers, rounded to float32 first.

        Raises:
            NumberError: the weight holds NaN or infinity.
            ShapeError: its shape cannot be stored so, or it holds no number.
            UnsupportedError: this codec only reads.
        """
        shape = tuple(weight.shape)
        if not shape or not entries(shape):
            message = f"a weight of shape {shape} has no rows of numbers to quantise; leave it as it is"
            raise ShapeError(message)
        self.parts(shape)
        return self.encode(weight)

    @final
    def dequantize(
        self, parts: Params, shape: tuple[int, ...], *, rows: tuple[int, int] | None = None, threads: int = 1
    ) -> Array:
        """The weight, or some of its rows, in float32.

        Args:
            parts: what `quantize` returned, or what a file holds; scales may have any floating dtype.
            shape: the shape of the weight.
            rows: the first row and the one after the last; all of them if None.
            threads: how many decode tiles of rows side by side, where the parts are NumPy's.

        Raises:
            ShapeError: a part is missing or has another shape than `parts(shape)` says, or there are no such rows.
        """
        self.check(parts, shape)
        begin, end = (0, shape[0]) if rows is None else rows
        if not 0 <= begin <= end <= shape[0]:
            message = f"rows {begin} to {end} of a weight with {shape[0]} rows; give 0 <= begin <= end <= {shape[0]}"
            raise ShapeError(message)
        if begin == end or not entries(shape):
            first = next(iter(parts.values()))
            xp = namespace(first)
            return xp.zeros((end - begin, *shape[1:]), dtype=xp.float32, device=device(first))
        if threads > 1 and all(isinstance(part, (np.ndarray, np.generic)) for part in parts.values()):
            return self._decode_in_threads(parts, shape, begin, end, threads)
        return self.decode(parts, shape, begin, end)

    def _decode_in_threads(
        self, parts: Params, shape: tuple[int, ...], begin: int, end: int, threads: int
    ) -> np.ndarray:
        whole = np.empty((end - begin, *shape[1:]), np.float32)
        step = self.row_step(shape)
        tile = min(max(whole.size // (2 * threads), _LEAST), _MOST)
        step *= max(1, tile // (row_size(shape) * step))

        def fill(place: int) -> None:
            first, last = max(begin, place), min(place + step, end)
            self.decode_into(parts, shape, first, last, whole[first - begin : last - begin])

        with ThreadPoolExecutor(threads, "decode") as pool:
            # Tiles begin where the codec's own do.
            deque(pool.map(fill, range(begin // step * step, end, step)), maxlen=0)
        return whole

    @final
    def check(self, parts: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """That every part is there with its shape.

        Raises:
            ShapeError: one is not.
        """
        for name, part in self.parts(shape).items():
            if name not in parts:
                message = f"a {self.kind} weight of shape {shape} lacks its part {name}; it has {', '.join(parts)}"
                raise ShapeError(message)
            if tuple(parts[name].shape) != part.shape:
                message = (
                    f"the part {name} of a {self.kind} weight of shape {shape} has shape {tuple(parts[name].shape)}; "
                    f"it must be {part.shape}"
                )
                raise ShapeError(message)

    def row_step(self, shape: tuple[int, ...]) -> int:
        """Tiles that begin at multiples of this decode nothing that lies outside of them."""
        return 1

    @final
    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of this shape takes.

        Example:
            >>> from peftarray.quant import codec
            >>> codec("nf4", double=False).nbytes((4096, 4096)) / 4096**2 * 8  # bits a weight
            4.5
        """
        return sum(part.nbytes for part in self.parts(shape).values())


def entries(shape: tuple[int, ...]) -> int:
    """How many numbers an array of this shape holds."""
    return math.prod(shape)


def row_size(shape: tuple[int, ...]) -> int:
    """How many numbers a row, an entry of the first axis, holds."""
    return math.prod(shape[1:])
