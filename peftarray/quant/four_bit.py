"""NF4 and FP4 as bitsandbytes stores them: two codes a byte, a scale a block, and the scales quantised once more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from peftarray.arrays import Array, Params, device, namespace
from peftarray.quant.blocks import (
    absmax_of,
    block_count,
    dequantize_dynamic,
    expand_scaled,
    flat,
    map_blocks,
    mean_in_order,
    quantize_dynamic,
    reciprocals,
    scaled,
)
from peftarray.quant.codebooks import DYNAMIC, FP4, NF4, Codebook
from peftarray.quant.codec import Part, entries
from peftarray.quant.flat import FlatCodec
from peftarray.quant.lookup import count_above, host_table
from peftarray.settings import boolean, check_settings, setting, whole

__all__ = ["FourBit", "FourBitFloat", "NormalFloat"]

_SMALLEST = 1e-38  # scale that bitsandbytes divides by


@dataclass(frozen=True)
class FourBit(FlatCodec):
    """Codes of four bits, a scale for every `block` numbers of the flat weight.

    Formula: `w[i] = values[code[i]] * absmax[i // block]`, where `absmax[b]` is stored in float32, or with `double` as
    `dynamic[code2[b]] * nested_absmax[b // 256] + nested_offset`.

    Parts: `codes` `(ceil(n / 2),)` uint8, the even entry in the high half; `absmax` `(blocks,)` float32, or uint8 with
    `double`, and then `nested_absmax`, `nested_map` (what the 256 codes of the scales stand for) and `nested_offset`.

    Attributes:
        block: numbers that share a scale.
        double: whether the scales are quantised as well, to about one byte each.
    """

    block: int = setting(64, whole(1), doc="numbers that share a scale")
    double: bool = setting(True, boolean, doc="whether the scales are quantised as well")

    book: ClassVar[Codebook]
    nested: ClassVar[int] = 256
    """Blocks whose scales are quantised together."""

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        count = entries(shape)
        blocks = block_count(count, self.block)
        found = {"codes": Part((-(-count // 2),), "U8"), "absmax": Part((blocks,), "U8" if self.double else "F32")}
        if self.double:
            found["nested_absmax"] = Part((block_count(blocks, self.nested),), "F32")
            found["nested_map"] = Part((256,), "F32")
            found["nested_offset"] = Part((), "F32")
        return found

    @property
    def step(self) -> int:
        return math.lcm(self.block, 2)

    def encode(self, weight: Array) -> dict[str, Array]:
        codes, absmax = map_blocks(flat(weight), self.step, self._codes)
        if not self.double:
            return {"codes": codes, "absmax": absmax}
        xp = namespace(absmax)
        offset = mean_in_order(absmax)
        short, nested = quantize_dynamic(absmax - offset, self.nested)
        values = xp.asarray(DYNAMIC.values, dtype=xp.float32, device=device(absmax), copy=True)
        return {
            "codes": codes,
            "absmax": short,
            "nested_absmax": nested,
            "nested_map": values,
            "nested_offset": offset,
        }

    def _codes(self, tile: Array) -> tuple[Array, Array]:
        """Packed codes and scales of a tile of whole blocks, of which the last may be shorter."""
        xp = namespace(tile)
        count = tile.shape[0]
        absmax = absmax_of(tile, self.block)
        unit = scaled(tile, reciprocals(absmax, _SMALLEST), self.block)
        left = count % self.block
        if left:  # bitsandbytes divides where a block is short, and stores no scale below the smallest
            last = xp.maximum(absmax[-1:], xp.full_like(absmax[-1:], _SMALLEST))
            unit = xp.concat([unit[: count - left], tile[count - left :] / last])
            absmax = xp.concat([absmax[:-1], last])
        if count % 2:
            unit = xp.concat([unit, xp.zeros_like(unit[:1])])
        places = count_above(unit, self.book.thresholds)
        packed = places[0::2] << 4 | places[1::2]
        if self.book.packed_order is not None:
            packed = xp.take(host_table(self.book.packed_order, packed), xp.astype(packed, xp.int32), axis=0)
        return packed, absmax

    def expand(self, parts: Params, held: slice, out: np.ndarray | None = None) -> Array:
        codes = parts["codes"][held.start // 2 : -(-held.stop // 2)]
        absmax = self._absmax(parts, held.start // self.block, block_count(held.stop, self.block))
        return expand_scaled(self.book.pairs, codes, absmax, self.block, held.stop - held.start, out=out)

    def _absmax(self, parts: Params, first: int, last: int) -> Array:
        """The scales of the blocks from `first` to `last`."""
        absmax = parts["absmax"]
        xp = namespace(absmax)
        if not self.double:
            return xp.astype(absmax[first:last], xp.float32)
        outer = first // self.nested
        codes = absmax[outer * self.nested : last]
        nested = parts["nested_absmax"][outer : block_count(last, self.nested)]
        numbers = dequantize_dynamic(codes, nested, self.nested, parts["nested_map"])
        return numbers[first - outer * self.nested :] + parts["nested_offset"]


@final
@dataclass(frozen=True)
class NormalFloat(FourBit):
    """NF4: the codes are quantiles of the normal distribution, as `FourBit` lays them out.

    Example:
        >>> import numpy as np
        >>> weight = np.linspace(-1, 1, 64, dtype=np.float32)[None, :]
        >>> codec = NormalFloat(double=False)
        >>> parts = codec.quantize(weight)
        >>> parts["codes"].dtype, parts["absmax"], codec.dequantize(parts, weight.shape)[0, :2]
        (dtype('uint8'), array([1.], dtype=float32), array([-1., -1.], dtype=float32))

    Reference: Dettmers, Pagnoni, Holtzman, Zettlemoyer, QLoRA, 2023, section 3, arXiv:2305.14314.
    """

    kind: ClassVar[str] = "nf4"
    book: ClassVar[Codebook] = NF4


@final
@dataclass(frozen=True)
class FourBitFloat(FourBit):
    """FP4: a sign, and eight magnitudes from 0 to 1 in twelfths, as `FourBit` lays them out.

    Reference: bitsandbytes; these are not the numbers of OCP's E2M1, which `MXFP4` and `NVFP4` store.
    """

    kind: ClassVar[str] = "fp4"
    book: ClassVar[Codebook] = FP4
