"""AWQ's layout: a transposed weight whose rows are packed by eights, in an order of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from peftarray.arrays import Array, Params, integers, namespace
from peftarray.errors import UnsupportedError
from peftarray.quant.codec import Codec, Part
from peftarray.quant.integers import (
    by_row_tiles,
    group_count,
    group_index,
    in_groups,
    require_matrix,
    transposed,
    unpack,
)
from peftarray.settings import check_settings, setting, whole

__all__ = ["AWQ"]

_BITS, _EACH = 4, 8
# A word holds its rows in the order 0, 2, 4, 6, 1, 3, 5, 7: row r is at the place PLACES[r].
_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])


@final
@dataclass(frozen=True)
class AWQ(Codec):
    """Weights that AWQ quantised to four bits, in the layout that is called `gemm`; it only reads.

    Formula: `w[r, c] = (q[c, r] - z[c // group, r]) * scale[c // group, r]`, all unsigned.

    Parts: `codes` `(columns, rows / 8)` int32 and `zeros` `(groups, rows / 8)` int32, both packed along the rows, the
    even ones of each eight before the odd ones; `scale` `(groups, rows)`.

    Attributes:
        group: columns that share a scale; 0 for all of them.

    Reference: Lin et al., AWQ: Activation-aware Weight Quantization, 2023, arXiv:2306.00978.
    """

    group: int = setting(128, whole(0), doc="columns that share a scale; 0 for all of them")

    kind: ClassVar[str] = "awq"

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        require_matrix(shape, self.kind, rows=_EACH)
        rows, columns = shape
        groups = group_count(columns, self.group)
        return {
            "codes": Part((columns, rows // _EACH), "I32"),
            "zeros": Part((groups, rows // _EACH), "I32"),
            "scale": Part((groups, rows), "F16"),
        }

    def row_step(self, shape: tuple[int, ...]) -> int:
        return _EACH

    def encode(self, weight: Array) -> dict[str, Array]:
        message = "awq weights come out of a calibration on data; quantise to another codec, such as ints"
        raise UnsupportedError(message)

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        codes = parts["codes"]
        index = group_index(shape[1], self.group, codes)

        def make(first: int, last: int) -> Array:
            scale = transposed(parts["scale"], first, last)
            return in_groups(_rows(codes, first, last), scale, _rows(parts["zeros"], first, last), index=index)

        return by_row_tiles(make, begin, end, width=shape[1], like=codes)


def _rows(words: Array, begin: int, end: int) -> Array:
    """The rows from `begin` to `end` of words `(n, rows / 8)`: `(end - begin, n)` float32."""
    xp = namespace(words)
    first = begin // _EACH
    near = words[:, first : -(-end // _EACH)]
    places = np.arange(begin, end) - first * _EACH
    order = places // _EACH * _EACH + _PLACES[places % _EACH]
    numbers = unpack(near, _BITS, near.shape[1] * _EACH)
    return xp.permute_dims(xp.take(numbers, integers(order, words), axis=1), (1, 0))
