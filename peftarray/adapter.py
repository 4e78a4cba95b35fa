"""An adapter on one layer: a method, and its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from peftarray.arrays import Array, Params, namespace
from peftarray.layers import Layer

if TYPE_CHECKING:
    from peftarray.method import AdapterConfig

__all__ = ["Adapter"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A method with its arrays, beside the weight that it adapts. A value: nothing in it changes.

    Attributes:
        config: the method, resolved for this layer.
        layer: what it knows of the layer.
        params: name -> array.
        trainable: whether training changes it.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoraConfig
        >>> weight = np.eye(3, dtype=np.float32)
        >>> adapter = LoraConfig(r=1).init(weight, seed=0)
        >>> bool((adapter.merge(weight) == weight).all())  # B starts at zero
        True
    """

    config: AdapterConfig
    layer: Layer
    params: Params
    trainable: bool = True

    @cached_property
    def prepared(self) -> dict[str, Array]:
        """What the method computes once from `params`."""
        return self.config.prepare(self.params, self.layer)

    def forward(self, x: Array, weight: Array, *, bias: Array | None = None) -> Array:
        """The adapted layer's output, by the method's cheapest exact path.

        Args:
            x: activations `(..., in)`; row numbers for an embedding; `(batch, in, *space)` for a convolution.
            weight: the frozen weight as the model stores it.
            bias: the frozen bias `(out,)`.

        Returns:
            `(..., out)`, for a convolution `(batch, out, *space')`.
        """
        y = self.config.apply(self.prepared, x, self.layer.view(weight), self.layer)
        if bias is None:
            return y
        changed = self.config.effective_bias(self.params, bias, self.layer.view(weight), self.layer)
        if self.layer.kind == "conv":
            changed = namespace(changed).reshape(changed, (-1, *(1 for _ in self.layer.kernel)))
        return y + changed

    def merge(self, weight: Array) -> Array:
        """The effective weight: a new array with the weight's shape and dtype, computed in float32 at least."""
        return self._through(weight, self.config.weight)

    def unmerge(self, weight: Array) -> Array:
        """The base weight of a merged one, to rounding.

        Raises:
            UnsupportedError: the method has no inverse.
        """
        return self._through(weight, self.config.inverse)

    def merge_bias(self, bias: Array, weight: Array | None = None) -> Array:
        """The effective bias."""
        matrix = None if weight is None else self.layer.view(weight)
        return self.config.effective_bias(self.params, bias, matrix, self.layer)

    def num_parameters(self) -> int:
        """How many trained numbers it holds; 0 when frozen."""
        return self.config.num_parameters(self.layer) if self.trainable else 0

    def freeze(self) -> Adapter:
        """The same adapter, which training leaves as it is."""
        return dataclasses.replace(self, trainable=False)

    def unfreeze(self) -> Adapter:
        """The same adapter, which training changes."""
        return dataclasses.replace(self, trainable=True)

    def _through(self, weight: Array, change: Callable[[Params, Array, Layer], Array]) -> Array:
        xp = namespace(weight, *self.params.values())
        matrix = self.layer.view(weight)
        if getattr(weight.dtype, "itemsize", 4) < 4:
            matrix = xp.astype(matrix, xp.float32)
        result = self.layer.unview(change(self.prepared, matrix, self.layer))
        return xp.astype(result, weight.dtype) if result.dtype != weight.dtype else result
