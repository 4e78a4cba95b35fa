"""Eight bits a number: rows as LLM.int8 stores them, and blocks of the dynamic code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from peftarray.arrays import Array, Params, namespace
from peftarray.quant.blocks import (
    absmax_of,
    block_count,
    dequantize_dynamic,
    flat,
    map_blocks,
    quantize_dynamic,
    tiles,
)
from peftarray.quant.codec import Codec, Part, entries, row_size
from peftarray.quant.flat import FlatCodec
from peftarray.quant.lookup import CACHED
from peftarray.settings import check_settings, setting, whole

__all__ = ["Int8Blocks", "Int8Rows"]

_STEP = 1 / 127


@final
@dataclass(frozen=True)
class Int8Rows(Codec):
    """Signed bytes with one scale a row, as bitsandbytes' LLM.int8 stores a weight.

    Formula: `w[r, c] = codes[r, c] * absmax[r] / 127`; the codes are rounded to nearest even.

    Parts: `codes` int8 in the weight's shape, `absmax` `(rows,)` float32. bitsandbytes rounds a weight to float16
    before it quantises it; hand one over that is rounded so to get its very codes.

    Example:
        >>> codec = Int8Rows()
        >>> codec.quantize(np.float32([[1, -2, 0.5]]))["codes"]
        array([[  64, -127,   32]], dtype=int8)

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, LLM.int8(), 2022, section 3, arXiv:2208.07339.
    """

    kind: ClassVar[str] = "int8"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"codes": Part(shape, "I8"), "absmax": Part(shape[:1], "F32")}

    def encode(self, weight: Array) -> dict[str, Array]:
        xp = namespace(weight)
        width = row_size(weight.shape)

        def make(tile: Array) -> tuple[Array, Array]:
            absmax = absmax_of(tile, width)
            rows = xp.reshape(tile, (-1, width))
            # A row of zeros has no scale, and its codes are zeros.
            scale = 1 / xp.where(absmax > 0, absmax, xp.ones_like(absmax)) * 127  # rounded twice, as torch divides 127
            codes = xp.astype(xp.round(rows * scale[:, None]), xp.int8)
            return xp.reshape(codes, (-1,)), absmax

        codes, absmax = map_blocks(flat(weight), width, make)
        return {"codes": xp.reshape(codes, weight.shape), "absmax": absmax}

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        codes, absmax = parts["codes"][begin:end, ...], parts["absmax"][begin:end]
        xp = namespace(codes)
        column = xp.reshape(xp.astype(absmax, xp.float32), (-1, *[1] * (len(shape) - 1)))
        if not isinstance(codes, np.ndarray):
            return xp.astype(codes, xp.float32) * column * _STEP
        values = np.empty(codes.shape, np.float32)
        for rows in tiles(len(codes), 1, most=max(1, CACHED // max(1, row_size(shape)))):
            np.multiply(codes[rows], column[rows], out=values[rows], dtype=np.float32)
            np.multiply(values[rows], np.float32(_STEP), out=values[rows])
        return values


@final
@dataclass(frozen=True)
class Int8Blocks(FlatCodec):
    """bitsandbytes' dynamic code of eight bits, a scale for every `block` numbers of the flat weight.

    Formula: `w[i] = dynamic[codes[i]] * absmax[i // block]`.

    Parts: `codes` uint8 in the weight's shape, `absmax` `(blocks,)` float32.

    Attributes:
        block: numbers that share a scale.

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, 8-bit Optimizers via Block-wise Quantization, 2021, section 2,
    arXiv:2110.02861.
    """

    block: int = setting(4096, whole(1), doc="numbers that share a scale")

    kind: ClassVar[str] = "int8-blocks"

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"codes": Part(shape, "U8"), "absmax": Part((block_count(entries(shape), self.block),), "F32")}

    @property
    def step(self) -> int:
        return self.block

    def encode(self, weight: Array) -> dict[str, Array]:
        codes, absmax = quantize_dynamic(flat(weight), self.block)
        return {"codes": namespace(codes).reshape(codes, weight.shape), "absmax": absmax}

    def expand(self, parts: Params, held: slice, out: np.ndarray | None = None) -> Array:
        absmax = parts["absmax"][held.start // self.block : block_count(held.stop, self.block)]
        return dequantize_dynamic(flat(parts["codes"])[held], absmax, self.block, out=out)
