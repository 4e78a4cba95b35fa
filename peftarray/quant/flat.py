"""Codecs of blocks of the flat weight, which may begin and end within a row: what they share."""

from __future__ import annotations

import abc

import numpy as np

from peftarray.arrays import Array, Params, namespace
from peftarray.quant.blocks import rows_between_blocks
from peftarray.quant.codec import Codec, entries, row_size

__all__ = ["FlatCodec"]


class FlatCodec(Codec):
    """A codec that decodes whole steps of the flat weight, whichever rows they lie in."""

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """Numbers that decode together: a block, or a few."""

    @abc.abstractmethod
    def expand(self, parts: Params, held: slice, out: np.ndarray | None = None) -> Array:
        """The numbers of whole steps, `(n,)` in float32; with NumPy also into `out`."""

    def row_step(self, shape: tuple[int, ...]) -> int:
        return rows_between_blocks(shape, self.step)

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        row, held = row_size(shape), self._covering(shape, begin, end)
        numbers = self.expand(parts, held)[begin * row - held.start : end * row - held.start]
        return namespace(numbers).reshape(numbers, (end - begin, *shape[1:]))

    def decode_into(self, parts: Params, shape: tuple[int, ...], begin: int, end: int, out: np.ndarray) -> None:
        row, held = row_size(shape), self._covering(shape, begin, end)
        if held == slice(begin * row, end * row):
            self.expand(parts, held, out.reshape(-1))
        else:
            super().decode_into(parts, shape, begin, end, out)

    def _covering(self, shape: tuple[int, ...], begin: int, end: int) -> slice:
        """The numbers from the first to the last step that some of the rows lie in."""
        row, step = row_size(shape), self.step
        return slice(begin * row // step * step, min(-(-end * row // step) * step, entries(shape)))
