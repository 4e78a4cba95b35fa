"""Signed integers of one to eight bits with a scale for each row or group, as compressed-tensors stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftarray.arrays import Array, Params, namespace
from peftarray.errors import ShapeError, UnsupportedError
from peftarray.quant.blocks import finite, flat, map_blocks
from peftarray.quant.codec import Codec, Part
from peftarray.quant.integers import (
    by_row_tiles,
    group_count,
    group_index,
    in_groups,
    pack,
    require_matrix,
    unpack,
    unpack_some,
    word_count,
)
from peftarray.settings import Rule, boolean, check_settings, setting, whole

__all__ = ["Ints"]

_bits = Rule(lambda value: type(value) is int and 1 <= value <= 8, "a whole number from 1 to 8")


@final
@dataclass(frozen=True)
class Ints(Codec):
    """Integers of few bits, rounded to nearest: what compressed-tensors calls `pack-quantized` and `int-quantized`.

    Formula: `w[r, c] = (q[r, c] - z[r, g]) * scale[r, g]` with `g = c // group`, or `g_idx[c]`, and `q` and `z` from
    `-2**(bits - 1)` on.

    Parts: `codes` `(rows, words)` int32, where `q + 2**(bits - 1)` is packed along the columns, or without `packed`
    int8 in the weight's shape; `scale` `(rows, groups)`; without `symmetric` `zeros`, `(words, groups)` int32 packed
    along the rows, or `(rows, groups)` int8; with `act_order` `g_idx` `(columns,)` int32.

    Attributes:
        bits: bits of a number, 1 to 8.
        group: columns that share a scale; 0 for all of them.
        symmetric: whether zero is the code 0 everywhere.
        packed: whether numbers lie close together in words of 32 bits, or each in a byte.
        act_order: whether groups are scattered columns, which `g_idx` names; such weights are only read.

    Example:
        >>> import numpy as np
        >>> codec = Ints(bits=4, group=0)
        >>> parts = codec.quantize(np.float32([[7.5, -3, 1, 0]]))
        >>> codec.dequantize(parts, (1, 4))
        array([[ 7., -3.,  1.,  0.]], dtype=float32)
    """

    bits: int = setting(4, _bits, doc="bits of a number")
    group: int = setting(128, whole(0), doc="columns that share a scale; 0 for all of them")
    symmetric: bool = setting(True, boolean, doc="whether zero is the code 0 everywhere")
    packed: bool = setting(True, boolean, doc="whether numbers lie close together in words")
    act_order: bool = setting(False, boolean, doc="whether groups are scattered columns")

    kind: ClassVar[str] = "ints"

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def _offset(self) -> int:
        return 1 << self.bits - 1

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        require_matrix(shape, self.kind)
        rows, columns = shape
        groups = group_count(columns, self.group)
        found = {
            "codes": Part((rows, word_count(columns, self.bits)), "I32") if self.packed else Part(shape, "I8"),
            "scale": Part((rows, groups), "F32"),
        }
        if not self.symmetric:
            words = word_count(rows, self.bits)
            found["zeros"] = Part((words, groups), "I32") if self.packed else Part((rows, groups), "I8")
        if self.act_order:
            found["g_idx"] = Part((columns,), "I32")
        return found

    def row_step(self, shape: tuple[int, ...]) -> int:
        return 1 if self.symmetric else 32

    def encode(self, weight: Array) -> dict[str, Array]:
        if self.act_order:
            message = "the order of ints with act_order comes out of a calibration on data; quantise without it"
            raise UnsupportedError(message)
        shape = tuple(weight.shape)
        if shape[1] % (self.group or shape[1]):
            message = f"{shape[1]} columns are no multiple of the group of {self.group}; give a group that divides them"
            raise ShapeError(message)
        xp, said = namespace(weight), self.parts(shape)
        codes, scale, zero = map_blocks(flat(weight), shape[1], lambda tile: self._quantize_rows(tile, shape[1]))
        parts = {"codes": xp.reshape(codes, said["codes"].shape), "scale": xp.reshape(scale, said["scale"].shape)}
        if not self.symmetric:
            zero = xp.reshape(zero, said["scale"].shape)
            across = xp.permute_dims(zero, (1, 0))
            parts["zeros"] = xp.permute_dims(self._stored(across), (1, 0)) if self.packed else self._stored(zero)
        return parts

    def _quantize_rows(self, tile: Array, columns: int) -> tuple[Array, Array, Array]:
        """Stored codes, scales and zeros of whole rows, all flat.

        As compressed-tensors has it: half the range on either side, so that the code at the top is cut.
        """
        xp = namespace(tile)
        groups = xp.reshape(tile, (-1, self.group or columns))
        least, most = -self._offset, self._offset - 1
        lowest, highest = finite(xp.min(groups, axis=1)), finite(xp.max(groups, axis=1))
        none = xp.zeros_like(lowest)
        lowest, highest = xp.minimum(lowest, none), xp.maximum(highest, none)
        span = xp.maximum(-lowest, highest) * 2 if self.symmetric else highest - lowest
        scale = xp.where(span > 0, span / (most - least), xp.ones_like(span))
        steps = groups / scale[:, None]
        zero = none
        if not self.symmetric:
            zero = xp.round(xp.clip(least - lowest / scale, least, most))
            steps = steps + zero[:, None]
        codes = xp.clip(xp.round(steps), least, most)
        return flat(self._stored(xp.reshape(codes, (-1, columns)))), scale, zero

    def _stored(self, numbers: Array) -> Array:
        xp = namespace(numbers)
        if not self.packed:
            return xp.astype(numbers, xp.int8)
        return pack(xp.astype(numbers, xp.int32) + self._offset, self.bits)

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        codes = parts["codes"]
        xp = namespace(codes)
        index = parts["g_idx"] if self.act_order else group_index(shape[1], self.group, codes)

        def make(first: int, last: int) -> Array:
            some = codes[first:last, :]
            scale = parts["scale"][first:last, :]
            if not self.packed:
                zero = 0.0 if self.symmetric else xp.astype(parts["zeros"][first:last, :], xp.float32)
                return in_groups(xp.astype(some, xp.float32), scale, zero, index=index)
            # The offset of codes and zeros cancels.
            zero = float(self._offset)
            if not self.symmetric:
                across = xp.permute_dims(parts["zeros"], (1, 0))
                zero = xp.permute_dims(unpack_some(across, self.bits, first, last), (1, 0))
            return in_groups(unpack(some, self.bits, shape[1]), scale, zero, index=index)

        return by_row_tiles(make, begin, end, width=shape[1], like=codes)
