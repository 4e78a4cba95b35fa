"""Where the numbers of a tensor of the result come from: bytes of a file, or a weight that it holds quantised."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from peftarray.dtypes import StorageDType, storage_dtype
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import SafetensorsFile, TensorInfo

if TYPE_CHECKING:
    from peftarray.quant.layouts import StoredWeight

__all__ = ["Origin", "QuantisedOrigin", "StoredOrigin", "Take", "taking"]

Take = Callable[[int, int], np.ndarray]
"""Rows `(begin, end)` of a tensor seen as a matrix; they must not be used once the block that gave this has ended."""


class Origin(abc.ABC):
    """The numbers of one tensor, seen as a matrix of as many columns as the caller likes, read by rows."""

    @property
    @abc.abstractmethod
    def dtype(self) -> StorageDType:
        """What `rows` gives."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """As the model has it."""

    @abc.abstractmethod
    def rows(self, begin: int, end: int, columns: int) -> AbstractContextManager[Take]:
        """A context manager that gives rows within `begin:end`."""

    def nbytes_as(self, code: str) -> int:
        """Bytes that it takes in another dtype, by the name of safetensors headers."""
        known = storage_dtype(code)
        assert known is not None  # what is converted is a floating dtype
        return math.prod(self.shape) * known.bits // 8

    def row_step(self, columns: int) -> int:
        """Ranges that begin at multiples of this decode nothing twice."""
        return 1

    def read(self, begin: int, end: int, columns: int) -> np.ndarray:
        """Some rows, to keep."""
        with self.rows(begin, end, columns) as take:
            return np.array(take(begin, end))


@dataclass(frozen=True)
class StoredOrigin(Origin):
    """A tensor as a file holds it."""

    file: SafetensorsFile
    info: TensorInfo

    @property
    def dtype(self) -> StorageDType:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def nbytes_as(self, code: str) -> int:
        return self.info.nbytes if code == self.info.code else super().nbytes_as(code)

    @contextmanager
    def rows(self, begin: int, end: int, columns: int) -> Iterator[Take]:
        kind = self.info.dtype.numpy
        assert kind is not None  # `TensorInfo.dtype` raises for dtypes without one
        at = self.info.begin + begin * columns * kind.itemsize
        with self.file.window(at, (end - begin, columns), kind) as found:
            yield lambda first, last: found[first - begin : last - begin]


@dataclass(frozen=True)
class QuantisedOrigin(Origin):
    """A weight that a checkpoint stores quantised: its rows are decoded as they are taken."""

    checkpoint: Checkpoint
    weight: StoredWeight

    @property
    def dtype(self) -> StorageDType:
        known = storage_dtype("F32")
        assert known is not None
        return known

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self.weight)

    @contextmanager
    def rows(self, begin: int, end: int, columns: int) -> Iterator[Take]:
        with ExitStack() as maps:

            def read(name: str) -> np.ndarray:
                info = self.checkpoint[name]
                kind = info.dtype.numpy
                assert kind is not None
                file = self.checkpoint.shard_of(name)
                return maps.enter_context(file.window(info.begin, info.shape, kind, whole=False))

            parts = self.weight.parts(read)
            yield taking(self.weight, parts, columns)
            parts.clear()  # views of maps that are closed now

    def row_step(self, columns: int) -> int:
        if len(self.shape) == 2 and not self.weight.transposed:
            return self.weight.codec.row_step(self.weight.shape) if columns == self.shape[1] else 1
        size = math.prod(self.shape[1:] if _cuts(self.weight) else self.shape)
        return max(1, size // max(1, columns))


def taking(weight: StoredWeight, parts: dict[str, np.ndarray], columns: int) -> Take:
    """Decodes rows of the matrix of so many columns that the model's weight is seen as.

    Of a weight of more than two axes, whole entries of the first axis are decoded; the last ones are kept.
    """
    size = max(1, math.prod(_shape(weight)[1:]))
    span, flat = (0, 0), np.empty(0, np.float32)

    def take(first: int, last: int) -> np.ndarray:
        nonlocal span, flat
        wanted = (first * columns // size, -(-last * columns // size)) if _cuts(weight) else (0, weight.shape[0])
        if wanted != span:
            found = weight.codec.dequantize(parts, weight.shape, rows=wanted)
            if weight.transposed:
                found = np.swapaxes(found, -1, -2)
            span, flat = wanted, found.reshape(-1)
        skipped = span[0] * size if _cuts(weight) else 0
        return flat[first * columns - skipped : last * columns - skipped].reshape(last - first, columns)

    return take


def _shape(weight: StoredWeight) -> tuple[int, ...]:
    """The shape that the model's parameter has."""
    shape = weight.shape
    return (*shape[:-2], shape[-1], shape[-2]) if weight.transposed else shape


def _cuts(weight: StoredWeight) -> bool:
    """Whether the first axis of the parameter is that of the stored weight."""
    return not (weight.transposed and len(weight.shape) == 2)
