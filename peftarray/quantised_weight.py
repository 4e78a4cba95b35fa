"""A quantised weight in place of the array: products with it decode a few rows at a time, and keep none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from peftarray.arrays import Array, device, multiplies_short, namespace, weight_product
from peftarray.autodiff.primitive import primitive
from peftarray.autodiff.rules import Needs, Result
from peftarray.autodiff.traced import is_traced
from peftarray.backend import backend_of, load_backend
from peftarray.quant.codec import Codec, row_size
from peftarray.stand_in import StandIn, kind_for

__all__ = ["QuantisedWeight", "quantised_weight"]

# So many numbers are decoded at once, or one step of the codec's where that is more: what stays in a core's cache, and
# for libraries that pay for each call what is small beside a model.
_TILE_ON_HOST = 1 << 18
_TILE = 1 << 22
# type of an array -> its library's `linear_map`; a plain dict filled on a miss, which compilers can trace.
_LINEAR_MAPS: dict[type, Callable[..., Array]] = {}


class QuantisedWeight(StandIn):
    """A frozen weight that is stored as the parts of a codec.

    `x @ w.mT`, `x @ w`, rows of an embedding and norms of rows go through tiles of the stored weight's rows: at most
    2^18 numbers (1 MB) are decoded at once on NumPy, 2^22 on other libraries, but for codecs whose rows only come in
    larger steps. A gradient for `x` decodes the tiles once more; nothing of the weight is kept for it. Any other
    function forms the whole weight, and counts that.

    Attributes:
        codec: how its numbers are stored.
        parts: name -> array, as `codec.parts` says.
        stored: the shape of the weight whose parts these are.
        materialised: how often the whole weight was formed, in this object and its transposes.

    Example:
        >>> import numpy as np
        >>> from peftarray.quant import quantize_array
        >>> base = np.eye(64, dtype=np.float32)
        >>> w = quantised_weight(*quantize_array(base, "nf4"), base.shape, base.dtype)
        >>> float((np.ones((2, 64), np.float32) @ w.T).sum()), w.materialised
        (128.0, 0)
    """

    is_packed: ClassVar[bool] = True
    codec: Codec
    parts: Mapping[str, Array]
    stored: tuple[int, ...]

    def __init__(
        self,
        codec: Codec,
        parts: Mapping[str, Array],
        stored: tuple[int, ...],
        dtype: Any,
        *,
        made_in: Any = None,
        flipped: bool = False,
        count: list[int] | None = None,
    ) -> None:
        """`quantised_weight` makes one; `made_in` is the dtype in which products are made, that of `x` if None."""
        self.codec = codec
        self.parts = parts
        self.stored = stored
        # A dtype as arrays have it: NumPy's and JAX's `float32` is a class.
        self._dtype = namespace(self._any_part).empty((0,), dtype=dtype).dtype
        self._made_in = made_in
        self._flipped = flipped
        self._count: list[int] = [0] if count is None else count

    def __repr__(self) -> str:
        return f"QuantisedWeight({self.codec}, {self.shape}, {self.dtype})"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored[::-1] if self._flipped else self.stored

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def device(self) -> Any:
        return device(self._any_part)

    @property
    def nbytes(self) -> int:
        """Bytes that it is stored in."""
        return self.codec.nbytes(self.stored)

    @property
    def materialised(self) -> int:
        return self._count[0]

    @property
    def mT(self) -> Any:
        if self.ndim != 2:
            return self.dense().mT
        return self._with(flipped=not self._flipped)

    def counted_as(self, dtype: Any) -> Self:
        """The same weight, which counts as an array of another floating dtype of its library."""
        return self._with(dtype=dtype)

    def widened(self) -> Self:
        xp = namespace(self._any_part)
        return self._with(dtype=xp.float32, made_in=self._dtype if multiplies_short(self._any_part) else None)

    def dense(self) -> Array:
        self._count[0] += 1
        weight = self._rows(0, self.stored[0], self._dtype)
        return weight.mT if self._flipped else weight

    def after(self, x: Array) -> Array:
        if self.ndim != 2 or x.ndim == 0:
            return x @ self.dense()
        rows = namespace(x).reshape(x, (-1, x.shape[-1]))
        if is_traced(rows):
            y = _product(rows, weight=self)
        else:
            y = _linear_map(rows)(self.multiplied, self.mT.multiplied, rows)
        return namespace(y).reshape(y, (*x.shape[:-1], y.shape[-1]))

    def rows(self, indices: Array) -> Array:
        if self._flipped:
            return NotImplemented
        xp = namespace(indices, self._any_part)
        flat = xp.reshape(indices, (-1,))
        found = xp.zeros((flat.shape[0], *self.stored[1:]), dtype=self._dtype, device=self.device)
        for begin, end in self._spans():
            inside = (flat >= begin) & (flat < end)
            if isinstance(flat, np.ndarray):
                if inside.any():
                    found[inside] = self._rows(begin, end, self._dtype)[flat[inside] - begin]
                continue
            tile = self._rows(begin, end, self._dtype)
            picked = xp.take(tile, xp.clip(flat - begin, 0, end - begin - 1), axis=0)
            found = xp.where(xp.reshape(inside, (-1, *(1 for _ in self.stored[1:]))), picked, found)
        return xp.reshape(found, (*indices.shape, *self.stored[1:]))

    def row_norms(self) -> Array:
        if self.ndim != 2:
            return NotImplemented
        xp = namespace(self._any_part)
        squares = []
        for begin, end in self._spans():
            tile = self._rows(begin, end, self._dtype if _is_wide(self._dtype) else xp.float32)
            squares.append(xp.sum(tile * tile, axis=0 if self._flipped else 1))
        total = sum(squares[1:], squares[0]) if self._flipped else xp.concat(squares)
        return xp.astype(xp.sqrt(total), self._dtype)

    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        return tuple(self.parts.values()), (
            self.codec,
            tuple(self.parts),
            self.stored,
            self._dtype,
            self._made_in,
            self._flipped,
        )

    @classmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        codec, names, stored, dtype, made_in, flipped = rest
        return cls(codec, dict(zip(names, arrays, strict=True)), stored, dtype, made_in=made_in, flipped=flipped)

    def __stop_gradient__(self) -> Self:
        return self

    @property
    def _any_part(self) -> Array:
        return next(iter(self.parts.values()))

    def _with(self, **changes: Any) -> Self:
        known = {"dtype": self._dtype, "made_in": self._made_in, "flipped": self._flipped, "count": self._count}
        return type(self)(self.codec, self.parts, self.stored, **{**known, **changes})

    def _spans(self) -> Iterator[tuple[int, int]]:
        """The first row and the one after the last of each tile."""
        most = _TILE_ON_HOST if isinstance(self._any_part, np.ndarray) else _TILE
        step = self.codec.row_step(self.stored)
        rows = max(1, most // max(1, row_size(self.stored)) // step) * step
        for begin in range(0, self.stored[0], rows):
            yield begin, min(begin + rows, self.stored[0])

    def _rows(self, begin: int, end: int, dtype: Any) -> Array:
        tile = self.codec.dequantize(self.parts, self.stored, rows=(begin, end))
        return tile if tile.dtype == dtype else namespace(tile).astype(tile, dtype)

    def multiplied(self, x: Array) -> Array:
        """`x @ self` for plain rows `(k, n)`, tile by tile."""
        xp, given = namespace(x), x.dtype
        inner = given if self._made_in is None else self._made_in
        wide = _is_wide(inner)
        if not wide and not multiplies_short(x):
            inner = xp.float32
        x = x if x.dtype == inner else xp.astype(x, inner)
        y = self._side_by_side(xp, x) if self._flipped else self._summed(xp, x, None if wide else xp.float32)
        return y if y.dtype == given else xp.astype(y, given)

    def _side_by_side(self, xp: Any, x: Array) -> Array:
        """Each tile of stored rows makes columns of the result."""
        if not isinstance(x, np.ndarray):
            parts = [x @ self._rows(begin, end, x.dtype).mT for begin, end in self._spans()]
            return parts[0] if len(parts) == 1 else xp.concat(parts, axis=1)
        y = np.empty((x.shape[0], self.stored[0]), x.dtype)
        for begin, end in self._spans():
            y[:, begin:end] = weight_product(x, self._rows(begin, end, x.dtype))
        return y

    def _summed(self, xp: Any, x: Array, total_in: Any) -> Array:
        """Each tile of stored rows meets columns of `x`; short dtypes are added up in a wider one."""
        total = None
        for begin, end in self._spans():
            part = x[:, begin:end] @ self._rows(begin, end, x.dtype)
            if total_in is not None:
                part = xp.astype(part, total_in)
            if total is None:
                total = part
            elif isinstance(total, np.ndarray):
                total += part
            else:
                total = total + part
        return total


@primitive
def _product(xp: Any, needs: Needs, x: Array, *, weight: QuantisedWeight) -> Result:
    """`x @ weight` of rows `(k, n)`; nothing of the weight is kept for the gradient."""
    return weight.multiplied(x), lambda g: (weight.mT.multiplied(g),)


def _linear_map(x: Array) -> Callable[..., Array]:
    """What a library has in place of the rule above."""
    found = _LINEAR_MAPS.get(type(x))
    if found is None:
        found = _LINEAR_MAPS[type(x)] = load_backend(backend_of(x)).linear_map
    return found


def _is_wide(dtype: Any) -> bool:
    return getattr(dtype, "itemsize", 4) >= 4


def quantised_weight(
    codec: Codec, parts: Mapping[str, Array], shape: tuple[int, ...], dtype: Any = None
) -> QuantisedWeight:
    """What stands in for the weight that `codec.dequantize(parts, shape)` gives.

    Args:
        codec: as `peftarray.codec` gives it.
        parts: in whatever library.
        shape: of the weight.
        dtype: what it counts as: a floating dtype of the library of `parts`; float32 if None.

    Raises:
        ShapeError: a part is missing, or has another shape than the codec says.
    """
    codec.check(parts, shape)
    ordered = {name: parts[name] for name in codec.parts(shape)}
    some = next(iter(ordered.values()))
    counted = namespace(some).float32 if dtype is None else dtype
    return kind_for(QuantisedWeight, some)(codec, ordered, tuple(shape), counted)
