"""GPTQ's layout: columns of a transposed weight, packed along the input, with a scale and a zero for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftarray.arrays import Array, Params, namespace
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
    unpack_some,
    word_count,
)
from peftarray.settings import boolean, check_settings, one_of, setting, whole

__all__ = ["GPTQ"]


@final
@dataclass(frozen=True)
class GPTQ(Codec):
    """Weights that GPTQ quantised, as AutoGPTQ, GPTQModel and transformers store them; it only reads.

    Formula: `w[r, c] = (q[c, r] - z[g, r]) * scale[g, r]` with `g = c // group`, or `g_idx[c]`; `q` and the stored
    zeros are unsigned, and files of version 1 store `z - 1`.

    Parts: `codes` `(columns * bits / 32, rows)` int32, packed along the columns; `zeros` `(groups, rows * bits / 32)`
    int32, packed along the rows; `scale` `(groups, rows)`; with `act_order` `g_idx` `(columns,)` int32.

    Attributes:
        bits: bits of a number: 2, 3, 4 or 8.
        group: columns that share a scale; 0 for all of them.
        version: 1 where files store the zero less one (`checkpoint_format` `gptq`), 2 where they do not (`gptq_v2`).
        act_order: whether groups are scattered columns, which `g_idx` names.

    Reference: Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, 2022, arXiv:2210.17323.
    """

    bits: int = setting(4, one_of(2, 3, 4, 8), doc="bits of a number")
    group: int = setting(128, whole(0), doc="columns that share a scale; 0 for all of them")
    version: int = setting(1, one_of(1, 2), doc="1 where files store the zero less one")
    act_order: bool = setting(False, boolean, doc="whether groups are scattered columns")

    kind: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        # Words of 3 bits come in threes, which 32 numbers fill.
        step = 32 if self.bits == 3 else 32 // self.bits
        require_matrix(shape, self.kind, rows=step, columns=step)
        rows, columns = shape
        groups = group_count(columns, self.group)
        found = {
            "codes": Part((word_count(columns, self.bits), rows), "I32"),
            "zeros": Part((groups, word_count(rows, self.bits)), "I32"),
            "scale": Part((groups, rows), "F16"),
        }
        if self.act_order:
            found["g_idx"] = Part((columns,), "I32")
        return found

    def row_step(self, shape: tuple[int, ...]) -> int:
        return 32

    def encode(self, weight: Array) -> dict[str, Array]:
        message = "gptq weights come out of a calibration on data; quantise to another codec, such as ints"
        raise UnsupportedError(message)

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        codes = parts["codes"]
        index = parts["g_idx"] if self.act_order else group_index(shape[1], self.group, codes)
        missing = 1 if self.version == 1 else 0

        def make(first: int, last: int) -> Array:
            numbers = unpack(transposed(codes, first, last), self.bits, shape[1])
            zeros = unpack_some(parts["zeros"], self.bits, first, last) + missing
            scale = transposed(parts["scale"], first, last)
            return in_groups(numbers, scale, namespace(zeros).permute_dims(zeros, (1, 0)), index=index)

        return by_row_tiles(make, begin, end, width=shape[1], like=codes)
