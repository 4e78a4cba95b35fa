"""OCP's floats of four bits with a scale for each short group: MXFP4 and NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from peftarray.arrays import Array, Params, constant, namespace
from peftarray.errors import ShapeError
from peftarray.quant.blocks import absmax_of, expand_scaled, flat, map_blocks, scaled
from peftarray.quant.codebooks import E2M1_PAIRS, E2M1_THRESHOLDS, POWERS, float8_table
from peftarray.quant.codec import Codec, Part, entries
from peftarray.quant.fp8 import decode_scales, encode_float8, largest_float8
from peftarray.quant.lookup import count_above
from peftarray.settings import check_settings, one_of, setting

__all__ = ["MXFP4", "NVFP4"]

_LARGEST = 6.0  # of E2M1
_MX_GROUP, _NV_GROUP = 32, 16
_E4M3 = "F8_E4M3"
_NO_SCALE = 0.125  # in place of a scale that rounds to zero, as compressed-tensors has it


@final
@dataclass(frozen=True)
class MXFP4(Codec):
    """E2M1 floats, and a power of two for every 32 of a row.

    Formula: `w[r, c] = e2m1(codes[r, c]) * 2 ** (scale[r, c // 32] - 127)`; the exponent is that of the largest
    magnitude, less 2, as the standard says, so that the largest may be cut to 6 of these.

    Parts: `codes` `(*shape[:-1], columns / 2)` uint8, the even column in the low half; `scale`
    `(*shape[:-1], columns / 32)` uint8.

    Example:
        >>> codec = MXFP4()
        >>> parts = codec.quantize(np.full((1, 32), 3, np.float32))
        >>> parts["scale"], codec.dequantize(parts, (1, 32))[0, :3]
        (array([[126]], dtype=uint8), array([3., 3., 3.], dtype=float32))

    Reference: OCP Microscaling Formats (MX) Specification 1.0, 2023, section 6.3.
    """

    kind: ClassVar[str] = "mxfp4"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        codes, groups = _shapes(shape, _MX_GROUP, self.kind)
        return {"codes": Part(codes, "U8"), "scale": Part(groups, "U8")}

    def encode(self, weight: Array) -> dict[str, Array]:
        def make(tile: Array) -> tuple[Array, Array]:
            xp = namespace(tile)
            absmax = absmax_of(tile, _MX_GROUP)
            # So many powers of two are no larger; the first of them, 2 ** -126, is the exponent 1.
            count = count_above(absmax, np.nextafter(POWERS, np.float32(0)))
            exponent = xp.astype(count, xp.int32) - 2
            exponent = xp.where(exponent > 0, exponent, xp.zeros_like(exponent))
            down = xp.take(constant(POWERS, absmax), 253 - exponent, axis=0)  # 2 ** (127 - exponent)
            return _pack(scaled(tile, down, _MX_GROUP)), xp.astype(exponent, xp.uint8)

        parts = self.parts(tuple(weight.shape))
        codes, scale = map_blocks(flat(weight), _MX_GROUP, make)
        return _shaped({"codes": codes, "scale": scale}, parts)

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        scale = decode_scales(flat(parts["scale"][begin:end, ...]), "F8_E8M0")
        return _decode(parts, scale, shape, begin, end, _MX_GROUP)


@final
@dataclass(frozen=True)
class NVFP4(Codec):
    """E2M1 floats, an e4m3 float for every 16 of a row, and a scale for the weight.

    Formula: `w[r, c] = e2m1(codes[r, c]) * (e4m3(scale[r, c // 16]) / global_scale)`, as compressed-tensors has it;
    with `global_scale="multiply"` as ModelOpt has it, `... * (e4m3(...) * global_scale)`.

    Parts: `codes` `(*shape[:-1], columns / 2)` uint8, the even column in the low half; `scale`
    `(*shape[:-1], columns / 16)` uint8, the floats' bits; `global_scale` `()` float32.

    Attributes:
        global_scale: `"divide"` or `"multiply"`: what it does to the groups' scales.

    Reference: NVIDIA, Introducing NVFP4 for Efficient and Accurate Low-Precision Inference, 2025.
    """

    global_scale: str = setting("divide", one_of("divide", "multiply"), doc="what it does to the groups' scales")

    kind: ClassVar[str] = "nvfp4"

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        codes, groups = _shapes(shape, _NV_GROUP, self.kind)
        return {"codes": Part(codes, "U8"), "scale": Part(groups, "U8"), "global_scale": Part((), "F32")}

    def encode(self, weight: Array) -> dict[str, Array]:
        xp, parts, values = namespace(weight), self.parts(tuple(weight.shape)), flat(weight)
        (absmax,) = map_blocks(values, _NV_GROUP, lambda tile: (absmax_of(tile, _NV_GROUP),))
        largest = xp.max(absmax)
        largest = xp.where(largest > 0, largest, xp.ones_like(largest))
        up = 1 / largest * (largest_float8(_E4M3) * _LARGEST)  # rounded twice, as torch divides a number
        stored = up if self.global_scale == "divide" else 1 / up
        wanted = up * (absmax / _LARGEST)
        scale = encode_float8(wanted, _E4M3)
        # A group whose scale is cut to nothing keeps one, so that it does not divide by zero.
        none = encode_float8(xp.full_like(wanted, _NO_SCALE), _E4M3)
        scale = xp.where(scale > 0, scale, none)
        steps = self._scales(scale, stored)
        groups = xp.reshape(xp.astype(values, xp.float32), (-1, _NV_GROUP)) / steps[:, None]
        (codes,) = map_blocks(flat(groups), 2, lambda tile: (_pack(tile),))
        return _shaped({"codes": codes, "scale": scale, "global_scale": stored}, parts)

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        steps = self._scales(flat(parts["scale"][begin:end, ...]), parts["global_scale"])
        return _decode(parts, steps, shape, begin, end, _NV_GROUP)

    def _scales(self, scale: Array, global_scale: Array) -> Array:
        xp = namespace(scale)
        numbers, whole = float8_table(_E4M3).expand(scale), xp.astype(global_scale, xp.float32)
        if self.global_scale == "multiply":
            return numbers * whole
        # Spread first: by one number, XLA would multiply with the reciprocal.
        return numbers / xp.broadcast_to(whole, numbers.shape)


def _shapes(shape: tuple[int, ...], group: int, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of packed codes and of scales."""
    if not shape or shape[-1] % group:
        message = (
            f"a weight of shape {shape} cannot be {kind}: its last axis must be a multiple of {group}; leave it as "
            "it is, or choose a codec without groups"
        )
        raise ShapeError(message)
    return (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // group)


def _shaped(arrays: dict[str, Array], parts: dict[str, Part]) -> dict[str, Array]:
    return {name: namespace(array).reshape(array, parts[name].shape) for name, array in arrays.items()}


def _pack(values: Array) -> Array:
    """Numbers `(2n,)` as E2M1, to nearest even and at most 6: two a byte, the low half first."""
    xp = namespace(values)
    codes = count_above(xp.abs(values), E2M1_THRESHOLDS) | xp.astype(xp.signbit(values), xp.uint8) << 3
    return codes[0::2] | codes[1::2] << 4


def _decode(parts: Params, steps: Array, shape: tuple[int, ...], begin: int, end: int, group: int) -> Array:
    codes = flat(parts["codes"][begin:end, ...])
    wanted = (end - begin, *shape[1:])
    return namespace(codes).reshape(expand_scaled(E2M1_PAIRS, codes, steps, group, entries(wanted)), wanted)
