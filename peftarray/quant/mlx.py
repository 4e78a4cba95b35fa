"""MLX's layout: unsigned integers packed along the columns, with a scale and a bias for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftarray.arrays import Array, Params, namespace
from peftarray.errors import ShapeError
from peftarray.quant.blocks import finite, flat, map_blocks
from peftarray.quant.codec import Codec, Part, entries
from peftarray.quant.integers import by_row_tiles, pack, unpack, word_count
from peftarray.settings import check_settings, one_of, setting

__all__ = ["MLX"]


@final
@dataclass(frozen=True)
class MLX(Codec):
    """Affine integers as `mlx.core.quantize` stores them.

    Formula: `w[..., c] = q[..., c] * scale[..., c // group] + bias[..., c // group]`, `q` unsigned.

    Parts: `codes` `(*shape[:-1], columns * bits / 32)` int32 (MLX calls the same words unsigned), `scale` and `bias`
    `(*shape[:-1], columns / group)`.

    Attributes:
        bits: bits of a number: 2, 4 or 8.
        group: columns that share a scale: 32, 64 or 128.
    """

    bits: int = setting(4, one_of(2, 4, 8), doc="bits of a number")
    group: int = setting(64, one_of(32, 64, 128), doc="columns that share a scale")

    kind: ClassVar[str] = "mlx"

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        if not shape or shape[-1] % self.group:
            message = f"a weight of shape {shape} cannot be mlx: its last axis must be a multiple of {self.group}"
            raise ShapeError(message)
        groups = (*shape[:-1], shape[-1] // self.group)
        codes = Part((*shape[:-1], word_count(shape[-1], self.bits)), "I32")
        return {"codes": codes, "scale": Part(groups, "F32"), "bias": Part(groups, "F32")}

    def encode(self, weight: Array) -> dict[str, Array]:
        """Rounded to nearest between the extremes of each group; MLX moves its steps so that zero is one of them."""
        parts, xp, columns = self.parts(tuple(weight.shape)), namespace(weight), weight.shape[-1]
        most = (1 << self.bits) - 1

        def make(tile: Array) -> tuple[Array, Array, Array]:
            groups = xp.reshape(tile, (-1, self.group))
            lowest, highest = finite(xp.min(groups, axis=1)), finite(xp.max(groups, axis=1))
            scale = xp.where(highest > lowest, (highest - lowest) / most, xp.ones_like(lowest))
            steps = xp.clip(xp.round((groups - lowest[:, None]) / scale[:, None]), 0, most)
            codes = pack(xp.astype(xp.reshape(steps, (-1, columns)), xp.int32), self.bits)
            return flat(codes), scale, lowest

        made = zip(parts, map_blocks(flat(weight), columns, make), strict=True)
        return {name: xp.reshape(array, parts[name].shape) for name, array in made}

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        xp = namespace(parts["codes"])

        def make(first: int, last: int) -> Array:
            codes, scale, bias = (parts[name][first:last, ...] for name in ("codes", "scale", "bias"))
            groups = xp.reshape(unpack(codes, self.bits, shape[-1]), (*scale.shape, self.group))
            values = groups * xp.astype(scale, xp.float32)[..., None] + xp.astype(bias, xp.float32)[..., None]
            return xp.reshape(values, (last - first, -1))

        rows = by_row_tiles(make, begin, end, width=entries(shape[1:]), like=parts["codes"])
        return xp.reshape(rows, (end - begin, *shape[1:]))
