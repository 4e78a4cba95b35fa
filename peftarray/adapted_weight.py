"""The weight that an adapter makes, in place of the array: model code uses it like the base's, and stays cheap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from peftarray.adapter import Adapter
from peftarray.arrays import Array
from peftarray.composition import Composition
from peftarray.errors import UnsupportedError
from peftarray.layers import Window
from peftarray.method_dropout import Drop
from peftarray.stand_in import OverArray, kind_for

if TYPE_CHECKING:
    from peftarray.method import AdapterConfig

__all__ = ["AdaptedWeight", "adapted"]


class AdaptedWeight(OverArray):
    """`adapter.merge(base)`, which is not formed as long as a model multiplies by it on the side of its inputs, takes
    rows of an embedding or convolves with it.

    Attributes:
        adapter: the method with its arrays, or several that act together.
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

    adapter: Adapter | Composition
    base: Array

    def __init__(
        self,
        adapter: Adapter | Composition,
        base: Array,
        drop: Any = None,
        flipped: bool = False,
        count: Any = None,
    ) -> None:
        self.adapter = adapter
        self.base = base
        self._drop = drop
        self._flipped = flipped
        self._count: list[int] = [0] if count is None else count

    def __repr__(self) -> str:
        methods = self.adapter.adapters if isinstance(self.adapter, Composition) else (self.adapter,)
        names = " + ".join(type(adapter.config).__name__ for adapter in methods)
        return f"AdaptedWeight({names}, {self.shape}, {self.dtype})"

    @property
    def materialised(self) -> int:
        return self._count[0]

    @property
    def mT(self) -> Any:
        if self.ndim != 2:
            return self.dense().mT
        return type(self)(self.adapter, self.base, self._drop, not self._flipped, self._count)

    def kept(self, keep: Callable[[AdapterConfig], bool]) -> Array:
        """The weight with those adapters alone whose method this says yes to: the frozen one where it is none."""
        base = self.base.kept(keep) if isinstance(self.base, AdaptedWeight) else self.base
        found = self.adapter.kept(keep)
        if found is None:
            return base.mT if self._flipped else base
        if found is self.adapter and base is self.base:
            return self
        return kind_for(AdaptedWeight, base, *found.params.values())(found, base, self._drop, self._flipped)

    def drops(self) -> bool:
        """Whether its adapter leaves something out at random now."""
        return self._drop is not None and self.adapter.drops()

    def dense(self) -> Array:
        if self.drops():
            message = (
                f"{self.adapter.layer.name}: the model forms this weight, and its adapter has dropout, which acts on "
                "what goes through the weight; use x @ w.T, w[ids] or their like, or no dropout"
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
        here = self.adapter.in_window(Window(stride, padding, dilation, groups))
        return here.forward(x, self.base, drop=self._drop)

    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        arrays, rest = self.adapter.take_apart()
        return (self.base, *arrays), (type(self.adapter), rest, self._drop, self._flipped)

    @classmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        kind, of_adapter, drop, flipped = rest
        return cls(kind.put_together(of_adapter, arrays[1:]), arrays[0], drop, flipped)

    def _forward(self, x: Array) -> Array:
        return self.adapter.forward(x, self.base, drop=self._drop)


def adapted(adapter: Adapter | Composition, base: Array, *, drop: Drop | Sequence[Drop] | None = None) -> AdaptedWeight:
    """What stands in for `adapter.merge(base)`.

    Args:
        adapter: made for this weight, one or several that act together.
        base: as the model stores it.
        drop: what the method's dropout draws by, in training; for several, one for all or one for each.
    """
    return kind_for(AdaptedWeight, base, *adapter.params.values())(adapter, base, drop)
