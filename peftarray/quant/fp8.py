"""Floats of eight bits with a scale for the whole weight, for each row, or for each block of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import ml_dtypes
import numpy as np

from peftarray.arrays import Array, Params, constant, namespace
from peftarray.errors import ShapeError
from peftarray.quant.blocks import absmax_of, block_count, expand_scaled, flat, map_blocks, tiles
from peftarray.quant.codebooks import POWERS, float8, float8_table, float8_thresholds
from peftarray.quant.codec import Codec, Part, entries
from peftarray.quant.lookup import CACHED, ByteTable, count_above
from peftarray.settings import Rule, check_settings, one_of, setting

__all__ = ["FP8", "decode_scales", "encode_float8", "largest_float8"]

_pair = Rule(
    lambda value: type(value) is tuple and len(value) == 2 and all(type(n) is int and n >= 1 for n in value),
    "two whole numbers of at least 1, rows and columns",
)


@final
@dataclass(frozen=True)
class FP8(Codec):
    """Floats of eight bits, times a scale.

    Formula: `w[r, c] = float8(codes[r, c]) * scale[...]`, where the scale is one for all (`"tensor"`), that of row `r`
    (`"row"`), or that of the block `(r // rows, c // columns)` (`"block"`, as DeepSeek-V3 has it, with shorter blocks
    at the edges). Despite its name there, `weight_scale_inv` is multiplied as well.

    Parts: `codes` uint8 in the weight's shape, the floats' bits; `scale` float32, or uint8 with `scale_dtype="F8_E8M0"`
    (powers of two): `()`, `(*shape[:-1], 1)` or `(*shape[:-2], blocks of rows, blocks of columns)`.

    Attributes:
        dtype: `"F8_E4M3"` (up to 448) or `"F8_E5M2"` (up to 57,344).
        scale: what has a scale of its own: `"tensor"`, `"row"` or `"block"`.
        block: rows and columns of a block.
        scale_dtype: `"F32"`, or `"F8_E8M0"` for the exponents of powers of two.

    Example:
        >>> codec = FP8(scale="row")
        >>> parts = codec.quantize(np.float32([[448, -2], [1, 0.25]]))
        >>> parts["codes"]
        array([[126, 192],
               [126, 110]], dtype=uint8)
        >>> codec.dequantize(parts, (2, 2)).tolist()
        [[448.0, -2.0], [1.0, 0.25]]

    Reference: Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433; DeepSeek-AI, DeepSeek-V3
    Technical Report, 2024, section 3.3, arXiv:2412.19437.
    """

    dtype: str = setting("F8_E4M3", one_of("F8_E4M3", "F8_E5M2"), doc="the floats")
    scale: str = setting("block", one_of("tensor", "row", "block"), doc="what has a scale of its own")
    block: tuple[int, int] = setting((128, 128), _pair, doc="rows and columns of a block")
    scale_dtype: str = setting("F32", one_of("F32", "F8_E8M0"), doc="how scales are stored")

    kind: ClassVar[str] = "fp8"

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        dtype = "U8" if self.scale_dtype == "F8_E8M0" else "F32"
        if self.scale == "tensor":
            scales: tuple[int, ...] = ()
        elif self.scale == "row":
            scales = (*shape[:-1], 1)
        elif len(shape) < 2:
            message = f"blocks of rows and columns need a weight of two axes or more, got shape {shape}"
            raise ShapeError(message)
        else:
            rows, columns = self.block
            scales = (*shape[:-2], block_count(shape[-2], rows), block_count(shape[-1], columns))
        return {"codes": Part(shape, "U8"), "scale": Part(scales, dtype)}

    def row_step(self, shape: tuple[int, ...]) -> int:
        return self.block[0] if self.scale == "block" and len(shape) == 2 else 1

    def encode(self, weight: Array) -> dict[str, Array]:
        quantize = {"tensor": self._quantize_tensor, "row": self._quantize_rows, "block": self._quantize_blocks}
        codes, scale = quantize[self.scale](weight)
        return {"codes": namespace(codes).reshape(codes, weight.shape), "scale": scale}

    def _quantize_tensor(self, weight: Array) -> tuple[Array, Array]:
        xp, values = namespace(weight), flat(weight)
        (largest,) = map_blocks(values, 1, lambda tile: (absmax_of(tile, tile.shape[0]),))
        scale, stored = self._scale(xp.max(largest, keepdims=True))
        (codes,) = map_blocks(values, 1, lambda tile: (encode_float8(tile / scale, self.dtype),))
        return codes, stored[0]

    def _quantize_rows(self, weight: Array) -> tuple[Array, Array]:
        xp, width = namespace(weight), weight.shape[-1]

        def make(tile: Array) -> tuple[Array, Array]:
            scale, stored = self._scale(absmax_of(tile, width))
            rows = xp.reshape(tile, (-1, width)) / scale[:, None]
            return encode_float8(flat(rows), self.dtype), stored

        codes, stored = map_blocks(flat(weight), width, make)
        return codes, xp.reshape(stored, (*weight.shape[:-1], 1))

    def _scale(self, absmax: Array) -> tuple[Array, Array]:
        """What to divide by, and how that is stored: compressed-tensors' way; a product would round differently."""
        xp = namespace(absmax)
        scale = xp.where(absmax > 0, absmax / largest_float8(self.dtype), xp.ones_like(absmax))
        return self._stored(scale)

    def _quantize_blocks(self, weight: Array) -> tuple[Array, Array]:
        """By multiplication with a reciprocal, as transformers does it."""
        xp, (rows, columns) = namespace(weight), self.block
        matrices = xp.reshape(weight, (-1, *weight.shape[-2:]))
        codes, scales = [], []
        for place in range(matrices.shape[0]):
            for begin in range(0, weight.shape[-2], rows):
                tile = xp.astype(matrices[place, begin : min(begin + rows, weight.shape[-2]), :], xp.float32)
                absmax = absmax_of(xp.max(xp.abs(tile), axis=0), columns)
                filled = absmax > 0
                # Rounded twice, as torch divides a number by a tensor.
                up = 1 / xp.where(filled, absmax, xp.ones_like(absmax)) * largest_float8(self.dtype)
                up = xp.where(filled, up, xp.ones_like(up))
                down, stored = self._stored(1 / up)
                if self.scale_dtype == "F8_E8M0":
                    up = 1 / down
                codes.append(encode_float8(tile * _along(up, columns, tile.shape[1]), self.dtype))
                scales.append(stored)
        return xp.concat(codes), xp.reshape(xp.stack(scales), self.parts(tuple(weight.shape))["scale"].shape)

    def _stored(self, scale: Array) -> tuple[Array, Array]:
        """The scales as a file holds them: what they are then, and their form there."""
        if self.scale_dtype == "F32":
            return scale, scale
        xp = namespace(scale)
        places = count_above(scale, POWERS[:-1])  # the power of two that is as large, or the next
        return xp.take(constant(POWERS, scale), xp.astype(places, xp.int32), axis=0), places + 1

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        codes, stored = parts["codes"][begin:end, ...], parts["scale"]
        xp, table = namespace(codes), float8_table(self.dtype)
        scale = decode_scales(stored, self.scale_dtype)
        count = entries(codes.shape)
        if self.scale == "tensor":
            values = expand_scaled(table, flat(codes), xp.reshape(scale, (1,)), max(1, count), count)
        elif self.scale == "row":
            values = expand_scaled(table, flat(codes), flat(scale[begin:end, ...]), shape[-1], count)
        elif len(shape) == 2:
            values = self._decode_matrix(codes, scale, begin)
        else:
            pairs = zip(_matrices(codes), _matrices(scale[begin:end, ...]), strict=True)
            found = [self._decode_matrix(matrix, mine, 0) for matrix, mine in pairs]
            values = xp.stack(found)
        return xp.reshape(values, codes.shape)

    def _decode_matrix(self, codes: Array, scale: Array, begin: int) -> Array:
        """Rows of a matrix that begin with row `begin` of the weight."""
        xp, table, (rows, columns) = namespace(codes), float8_table(self.dtype), self.block
        count, width = codes.shape
        if not isinstance(codes, np.ndarray):
            mine = scale[begin // rows : block_count(begin + count, rows), :]
            full = xp.repeat(_along(mine, columns, width), rows, axis=0)[begin % rows :, :][:count, :]
            return xp.reshape(table.expand(flat(codes)), (count, width)) * full
        values = np.empty((count, width), np.float32)
        at = 0
        while at < count:
            row = (begin + at) // rows
            stop = min(count, (row + 1) * rows - begin)
            # The scales of a row of blocks, spread over its columns, stay in the cache.
            spread = _along(scale[row], columns, width)
            for some in tiles(stop - at, 1, most=max(1, CACHED // max(1, width))):
                into = values[at + some.start : at + some.stop]
                table.expand_into(codes[at + some.start : at + some.stop].reshape(-1), into.reshape(-1))
                np.multiply(into, spread, out=into)
            at = stop
        return values


def largest_float8(dtype: str) -> float:
    """The largest number that a float of eight bits holds.

    Example:
        >>> largest_float8("F8_E4M3"), largest_float8("F8_E5M2")
        (448.0, 57344.0)
    """
    return float(float8_table(dtype).values[len(float8_thresholds(dtype)), 0])


def encode_float8(values: Array, dtype: str) -> Array:
    """float32 numbers as the bits of floats of eight bits, uint8: to nearest even, and at most the largest.

    Example:
        >>> encode_float8(np.float32([1, -1, 1e9]), "F8_E4M3")
        array([ 56, 184, 126], dtype=uint8)
    """
    xp = namespace(values)
    if isinstance(values, np.ndarray):
        most = np.float32(largest_float8(dtype))
        return np.clip(values, -most, most).astype(float8(dtype)).view(np.uint8)
    codes = count_above(xp.abs(values), float8_thresholds(dtype))
    return codes + xp.astype(xp.signbit(values), xp.uint8) * 128


def decode_scales(stored: Array, dtype: str) -> Array:
    """Scales of any floating dtype, or the exponents of powers of two as bytes, in float32."""
    xp = namespace(stored)
    if dtype != "F8_E8M0":
        return xp.astype(stored, xp.float32)
    return xp.reshape(_EXPONENTS.expand(flat(stored)), stored.shape)


_EXPONENTS = ByteTable(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[:, None])


def _along(scales: Array, columns: int, width: int) -> Array:
    """Scales of blocks of columns, each as often as its block is wide."""
    return namespace(scales).repeat(scales, columns, axis=-1)[..., :width]


def _matrices(stack: Array) -> list[Array]:
    """The matrices in the last two axes."""
    matrices = namespace(stack).reshape(stack, (-1, *stack.shape[-2:]))
    return [matrices[place, ...] for place in range(matrices.shape[0])]
