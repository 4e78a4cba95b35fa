"""A weight of a short dtype among float32 arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from peftarray.arrays import Array, device, is_short, multiplies_short, namespace
from peftarray.stand_in import StandIn, kind_for

__all__ = ["Widened", "widened"]


class Widened(StandIn):
    """A bfloat16 or float16 weight that counts as float32, in formulas whose other arrays are float32.

    A product with it is made in its own dtype, as the model without an adapter makes it, and no copy of it is: only `x`
    and the result change their dtype. Anything else happens in float32. NumPy multiplies short numbers hundreds of
    times slower than others; there the weight is widened.

    Attributes:
        base: the weight.
    """

    base: Array

    def __init__(self, base: Array) -> None:
        self.base = base

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return namespace(self.base).float32

    @property
    def device(self) -> Any:
        return device(self.base)

    @property
    def mT(self) -> Widened:
        return type(self)(self.base.mT)

    def dense(self) -> Array:
        xp = namespace(self.base)
        return xp.astype(self.base, xp.float32)

    def after(self, x: Array) -> Array:
        xp = namespace(x, self.base)
        if not multiplies_short(self.base):
            return x @ self.dense()
        return xp.astype(xp.astype(x, self.base.dtype) @ self.base, xp.float32)

    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        return (self.base,), None

    @classmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        return cls(arrays[0])

    def rows(self, indices: Array) -> Array:
        xp = namespace(self.base)
        flat = xp.take(self.base, xp.reshape(indices, (-1,)), axis=0)
        return xp.astype(xp.reshape(flat, (*indices.shape, *self.shape[1:])), xp.float32)


def widened(array: Array) -> Array:
    """The array, or in its place what counts as float32 where its dtype is a short one."""
    if not is_short(array):
        return array
    own = array.widened() if isinstance(array, StandIn) else NotImplemented
    return kind_for(Widened, array)(array) if own is NotImplemented else own
