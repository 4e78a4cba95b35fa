"""An adapter on one layer: a method, and its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from peftarray.arrays import Array, Params, is_short, is_writable, namespace, stop_gradient
from peftarray.errors import UnsupportedError
from peftarray.layers import Layer, Window
from peftarray.method_dropout import Drop, Dropout, applied_with_dropout, update_with_dropout
from peftarray.routes import Weight
from peftarray.stand_in import formed
from peftarray.widened import widened

if TYPE_CHECKING:
    from peftarray.method import AdapterConfig

__all__ = ["Adapter", "beside_short", "over_channels"]


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

    @property
    def prepared(self) -> dict[str, Array]:
        """What the method computes once from `params`, in float32 at least.

        It is not kept: compilers trace it, and an optimiser of torch's changes the arrays that it is made of.
        """
        return self.config.prepare(self.wide_params, self.layer)

    def forward(self, x: Array, weight: Array, *, bias: Array | None = None, drop: Drop | None = None) -> Array:
        """The adapted layer's output, by the method's cheapest exact path.

        Beside a weight of a short dtype, the product with the weight is made in that dtype and all else in float32.

        Args:
            x: activations `(..., in)`; row numbers for an embedding; `(batch, in, *space)` for a convolution.
            weight: the frozen weight as the model stores it.
            bias: the frozen bias `(out,)`.
            drop: while training, what the method's dropout draws by; without it nothing is dropped.

        Returns:
            `(..., out)`, for a convolution `(batch, out, *space')`; in the weight's dtype if that is a short one.
        """

        def apply(given: Array, wide: Array) -> Array:
            matrix = self.layer.view(wide)
            if drop is None:
                y = self.config.apply(self.prepared, given, matrix, self.layer)
            else:
                y = applied_with_dropout(self.config, self.wide_params, given, matrix, self.layer, drop)
            if bias is None:
                return y
            return y + over_channels(self.config.effective_bias(self.params, bias, matrix, self.layer), self.layer)

        return beside_short(apply, x, weight, self.layer)

    def added(self, x: Array, *, bias: Array | None = None, drop: Drop | None = None) -> Array:
        """What a method that `adds_apart` adds to the layer's own output; arguments as for `forward`."""
        y = self.apply_update(x, None, drop=drop)
        if bias is None:
            return y
        return y + over_channels(self.config.effective_bias(self.params, bias, None, self.layer) - bias, self.layer)

    def apply_update(self, x: Array, weight: Array | None, *, drop: Drop | None = None) -> Array:
        """What the adapter adds to the product with the frozen weight, before any bias.

        Args:
            x, drop: as for `forward`.
            weight: the frozen weight as the model stores it; it may be None where the method `adds_apart`.
        """
        matrix = None if weight is None else self.layer.view(weight)
        if drop is None:
            return self.config.apply_update(self.prepared, x, matrix, self.layer)
        return update_with_dropout(self.config, self.wide_params, x, matrix, self.layer, drop)

    def adds_apart(self) -> bool:
        """Whether `apply_update` needs no weight."""
        return self.config.adds_apart()

    def touches(self) -> tuple[str, ...]:
        """What of the layer it changes: `"weight"`, `"bias"` or both."""
        return self.config.touches(self.layer)

    def drops(self) -> bool:
        """Whether its method leaves something out in training."""
        return self.config.dropout() != Dropout()

    def merge(self, weight: Array) -> Array:
        """The effective weight: a new array with the weight's shape and dtype, computed in float32 at least."""
        return self._through(weight, self.config.weight)

    def merge_into(self, weight: Array) -> None:
        """Put the effective weight in the place of the weight, mostly without a second array of its size.

        Raises:
            UnsupportedError: the array cannot be written into, as none of JAX's can, or stands for a weight.

        Example:
            >>> import numpy as np
            >>> from peftarray import IA3Config
            >>> weight = np.ones((2, 3), np.float32)
            >>> adapter = dataclasses.replace(IA3Config().init(weight), params={"ia3_l": np.float32([[2], [3]])})
            >>> adapter.merge_into(weight)
            >>> weight.tolist()
            [[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]
        """
        if isinstance(weight, Weight) or not is_writable(weight):
            message = f"{self.layer.name}: the weight cannot be written into; use merge, which makes a new array"
            raise UnsupportedError(message)
        weight = stop_gradient(weight)
        still = Adapter(self.config, self.layer, {name: stop_gradient(array) for name, array in self.params.items()})
        if is_short(weight) or self.layer.kernel:  # whose matrix need not share its memory
            weight[...] = still.merge(weight)
        else:
            self.config.weight_into(still.prepared, self.layer.view(weight), self.layer)

    def change(self, weight: Array) -> Array:
        """What `merge` adds to the weight, in float32 at least and as the model stores it."""
        return self.layer.unview(self.update(weight))

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

    def product(self) -> tuple[Array, Array] | None:
        """`up (out, r)` and `down (r, fan_in)` whose product is the update, in float32 at least; None without such."""
        return self.config.product(self.wide_params, self.layer)

    def update(self, weight: Array | None = None) -> Array:
        """What it adds to the `(out, fan_in)` matrix, in float32 at least; `weight` where the method needs the base."""
        matrix = None if weight is None else _widened(self.layer.view(formed(weight)))
        return self.config.update(self.prepared, matrix, self.layer)

    def num_parameters(self) -> int:
        """How many trained numbers it holds; 0 when frozen."""
        return self.config.num_parameters(self.layer) if self.trainable else 0

    def freeze(self) -> Adapter:
        """The same adapter, which training leaves as it is."""
        return dataclasses.replace(self, trainable=False)

    def unfreeze(self) -> Adapter:
        """The same adapter, which training changes."""
        return dataclasses.replace(self, trainable=True)

    def kept(self, keep: Callable[[AdapterConfig], bool]) -> Adapter | None:
        """The adapter where this says yes to its method."""
        return self if keep(self.config) else None

    def in_window(self, window: Window) -> Adapter:
        """The same adapter for a convolution that slides over its input in this way."""
        return dataclasses.replace(self, layer=dataclasses.replace(self.layer, window=window))

    def take_apart(self) -> tuple[tuple[Array, ...], Hashable]:
        """Its arrays, and the rest, which is hashable."""
        return tuple(self.params.values()), (self.config, self.layer, tuple(self.params), self.trainable)

    @classmethod
    def put_together(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        """The inverse of `take_apart`, with whatever stands for the arrays."""
        config, layer, names, trainable = rest
        return cls(config, layer, dict(zip(names, arrays, strict=True)), trainable)

    @property
    def wide_params(self) -> dict[str, Array]:
        """Its arrays, in float32 at least."""
        return {name: _widened(array) for name, array in self.params.items()}

    def _through(self, weight: Array, change: Callable[[Params, Array, Layer], Array]) -> Array:
        matrix = _widened(self.layer.view(formed(weight)))
        result = self.layer.unview(change(self.prepared, matrix, self.layer))
        return namespace(result).astype(result, weight.dtype) if result.dtype != weight.dtype else result


def beside_short(apply: Callable[[Array, Array], Array], x: Array, weight: Array, layer: Layer) -> Array:
    """`apply(x, weight)` of a layer; beside a weight of a short dtype, in float32 but for products with the weight."""
    if not is_short(weight):
        return apply(x, weight)
    given = _widened(x)
    y = apply(given, widened(weight))
    return namespace(y).astype(y, weight.dtype) if given is not x or layer.kind == "embedding" else y


def over_channels(bias: Array, layer: Layer) -> Array:
    """A bias as it is added to the layer's output."""
    if layer.kind != "conv":
        return bias
    return namespace(bias).reshape(bias, (-1, *(1 for _ in layer.kernel)))


def _widened(array: Array) -> Array:
    """The same numbers in float32 where they are stored in a shorter floating dtype."""
    if not is_short(array):
        return array
    xp = namespace(array)
    return xp.astype(array, xp.float32)
