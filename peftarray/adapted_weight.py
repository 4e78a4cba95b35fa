"""The weight that an adapter makes, in place of the array: model code uses it like the base's, and stays cheap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

from peftarray.adapter import Adapter
from peftarray.arrays import Array, device
from peftarray.errors import UnsupportedError
from peftarray.layers import Window
from peftarray.method_dropout import Drop, Dropout
from peftarray.stand_in import StandIn, kind_for

__all__ = ["AdaptedWeight", "adapted"]


class AdaptedWeight(StandIn):
    """`adapter.merge(base)`, which is not formed as long as a model multiplies by it on the side of its inputs, takes
    rows of an embedding or convolves with it.

    Attributes:
        adapter: the method with its arrays.
        base: the frozen weight as the model stores it.
        materialised: how often the weight was formed, in this object and its transposes: 0 for model code that stays
            on the cheap way.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoraConfig
        >>> base = np.eye(3, dtype=np.float32)
        >>> w = adapted(LoraConfig(r=1).init(base), base)
        >>> (np.ones((2, 3), np.float32) @ w.T).shape, w.materialised
        ((2, 3), 0)
        >>> float(np.sum(w)), w.materialised
        (3.0, 1)
    """

    adapter: Adapter
    base: Array

    def __init__(
        self, adapter: Adapter, base: Array, drop: Drop | None = None, flipped: bool = False, count: Any = None
    ) -> None:
        self.adapter = adapter
        self.base = base
        self._drop = drop
        self._flipped = flipped
        self._count: list[int] = [0] if count is None else count

    def __repr__(self) -> str:
        return f"AdaptedWeight({type(self.adapter.config).__name__}, {self.shape}, {self.dtype})"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.base.shape)
        return shape[::-1] if self._flipped else shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def device(self) -> Any:
        return device(self.base)

    @property
    def materialised(self) -> int:
        return self._count[0]

    @property
    def mT(self) -> Any:
        if self.ndim != 2:
            return self.dense().mT
        return type(self)(self.adapter, self.base, self._drop, not self._flipped, self._count)

    def dense(self) -> Array:
        if self._drop is not None and self.adapter.config.dropout() != Dropout():
            message = (
                f"{self.adapter.layer.name}: the model forms this weight, and {type(self.adapter.config).__name__} has "
                "dropout, which acts on what goes through the weight; use x @ w.T, w[ids] or their like, or no dropout"
            )
            raise UnsupportedError(message)
        self._count[0] += 1
        weight = self.adapter.merge(self.base)
        return weight.mT if self._flipped else weight

    def after(self, x: Array) -> Array:
        layer = self.adapter.layer
        if layer.kind != "linear" or self._flipped == layer.transposed:
            return x @ self.dense()
        if x.ndim == 1:
            return self._forward(x[None, :])[0, ...]
        return self._forward(x)

    def rows(self, indices: Array) -> Array:
        if self.adapter.layer.kind != "embedding" or self._flipped:
            return NotImplemented
        return self._forward(indices)

    def convolved(self, x: Array, window: tuple[tuple[int, ...], ...], groups: int) -> Array:
        layer = self.adapter.layer
        if layer.kind != "conv" or len(layer.kernel) != len(window[0]):
            return NotImplemented
        stride, padding, dilation = window
        here = replace(layer, window=Window(stride, padding, dilation, groups))
        return replace(self.adapter, layer=here).forward(x, self.base, drop=self._drop)

    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        adapter = self.adapter
        rest = (adapter.config, adapter.layer, adapter.trainable, tuple(adapter.params), self._drop, self._flipped)
        return (self.base, *adapter.params.values()), rest

    @classmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        config, layer, trainable, names, drop, flipped = rest
        params = dict(zip(names, arrays[1:], strict=True))
        return cls(Adapter(config, layer, params, trainable), arrays[0], drop, flipped)

    def __tree_items__(self) -> Iterator[tuple[str, Array]]:
        return ((str(place), array) for place, array in enumerate(self.flatten()[0]))

    def __tree_refill__(self, arrays: Sequence[Any]) -> Self:
        known = [array for array in arrays if hasattr(array, "dtype")]
        kind = kind_for(self._abstract, *known) if known else type(self)
        return kind.unflatten(self.flatten()[1], arrays)

    def _forward(self, x: Array) -> Array:
        return self.adapter.forward(x, self.base, drop=self._drop)


def adapted(adapter: Adapter, base: Array, *, drop: Drop | None = None) -> AdaptedWeight:
    """What stands in for `adapter.merge(base)`.

    Args:
        adapter: made for this weight.
        base: as the model stores it.
        drop: what the method's dropout draws by, in training.
    """
    return kind_for(AdaptedWeight, base, *adapter.params.values())(adapter, base, drop)
