"""Several adapters on one layer: every update is taken of the frozen weight, and all are added, each times its scale.

    W' = W + sum_i s_i (F_i(W) - W),    b' = b + sum_i s_i (f_i(b) - b)

So their order does not matter, one adapter of scale 1 is that adapter, and the forward pass, `merge` here and the
merging of checkpoints (`peftarray.merge` of several adapters) follow one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from peftarray.adapter import Adapter, beside_short, over_channels
from peftarray.arrays import Array, namespace
from peftarray.errors import ConfigError
from peftarray.layers import Layer, Window, contract
from peftarray.method_dropout import Drop

if TYPE_CHECKING:
    from peftarray.method import AdapterConfig

__all__ = ["Composition", "composed"]


@dataclass(frozen=True, eq=False)
class Composition:
    """Adapters that act together on one layer. A value: it is used like an `Adapter`.

    Attributes:
        adapters: at least one, all for the same weight.
        scales: what the update of each is multiplied by.

    Example:
        >>> import numpy as np
        >>> from peftarray import IA3Config, LoraConfig
        >>> weight = np.ones((3, 4), np.float32)
        >>> adapters = tuple(config.init(weight) for config in (LoraConfig(r=2, init_lora_weights=False), IA3Config()))
        >>> both = Composition(adapters, (1.0, 0.5))
        >>> x = np.eye(4, dtype=np.float32)
        >>> bool(np.allclose(both.forward(x, weight), x @ both.merge(weight).T, atol=1e-5))
        True
    """

    adapters: tuple[Adapter, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.adapters or len(self.adapters) != len(self.scales):
            message = (
                f"a composition has {len(self.adapters)} adapters and {len(self.scales)} scales; give at least one "
                "adapter, and a scale for each"
            )
            raise ConfigError(message)

    @property
    def layer(self) -> Layer:
        """What the first of them knows of the layer."""
        return self.adapters[0].layer

    @property
    def params(self) -> Mapping[str, Array]:
        """`<place of the adapter>.<name>` -> array."""
        return {
            f"{place}.{name}": array
            for place, adapter in enumerate(self.adapters)
            for name, array in adapter.params.items()
        }

    def forward(
        self, x: Array, weight: Array, *, bias: Array | None = None, drop: Drop | Sequence[Drop] | None = None
    ) -> Array:
        """The adapted layer's output: one product with the frozen weight, and the update of each adapter.

        Args:
            x, weight, bias: as for `Adapter.forward`.
            drop: what dropout draws by, one for all adapters or one for each.
        """

        def apply(given: Array, wide_weight: Array) -> Array:
            y = contract(given, self.layer.view(wide_weight), self.layer)
            for adapter, scale, draw in zip(self.adapters, self.scales, self._draws(drop), strict=True):
                if "weight" in adapter.touches():
                    own = None if adapter.adds_apart() else wide_weight
                    y = y + _times(adapter.apply_update(given, own, drop=draw), scale)
            return y if bias is None else y + over_channels(self.merge_bias(bias, weight), self.layer)

        return beside_short(apply, x, weight, self.layer)

    def added(self, x: Array, *, bias: Array | None = None, drop: Drop | Sequence[Drop] | None = None) -> Array:
        """What adapters that all `adds_apart` add to the layer's own output; arguments as for `forward`."""
        y: Array = 0.0
        for adapter, scale, draw in zip(self.adapters, self.scales, self._draws(drop), strict=True):
            y = y + _times(adapter.apply_update(x, None, drop=draw), scale)
        return y if bias is None else y + over_channels(self.merge_bias(bias) - bias, self.layer)

    def adds_apart(self) -> bool:
        """Whether none of them needs the weight."""
        return all(adapter.adds_apart() for adapter in self.adapters)

    def touches(self) -> tuple[str, ...]:
        """What of the layer they change: `"weight"`, `"bias"` or both."""
        found = {part for adapter in self.adapters for part in adapter.touches()}
        return tuple(part for part in ("weight", "bias") if part in found)

    def drops(self) -> bool:
        """Whether one of them leaves something out in training."""
        return any(adapter.drops() for adapter in self.adapters)

    def merge(self, weight: Array) -> Array:
        """The effective weight: a new array with the weight's shape and dtype, computed in float32 at least."""
        total = weight
        for adapter, scale in zip(self.adapters, self.scales, strict=True):
            if "weight" in adapter.touches():
                change = _times(adapter.change(weight), scale)
                xp = namespace(total, change)
                total = (xp.astype(total, change.dtype) if total.dtype != change.dtype else total) + change
        return namespace(total).astype(total, weight.dtype) if total.dtype != weight.dtype else total

    def merge_bias(self, bias: Array, weight: Array | None = None) -> Array:
        """The effective bias."""
        total = bias
        for adapter, scale in zip(self.adapters, self.scales, strict=True):
            if "bias" in adapter.touches():
                total = total + _times(adapter.merge_bias(bias, weight) - bias, scale)
        return total

    def kept(self, keep: Callable[[AdapterConfig], bool]) -> Adapter | Composition | None:
        """Those adapters alone whose method this says yes to; None where it is none."""
        parts = [pair for pair in zip(self.adapters, self.scales, strict=True) if keep(pair[0].config)]
        return composed(*zip(*parts, strict=True)) if parts else None

    def in_window(self, window: Window) -> Composition:
        """The same for a convolution that slides over its input in this way."""
        return replace(self, adapters=tuple(adapter.in_window(window) for adapter in self.adapters))

    def take_apart(self) -> tuple[tuple[Array, ...], Hashable]:
        """Its arrays, and the rest, which is hashable where the scales are numbers."""
        parts = [adapter.take_apart() for adapter in self.adapters]
        rest = tuple((len(arrays), rest) for arrays, rest in parts)
        return tuple(array for arrays, _ in parts for array in arrays), (rest, self.scales)

    @classmethod
    def put_together(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        """The inverse of `take_apart`, with whatever stands for the arrays."""
        parts, scales = rest
        adapters, start = [], 0
        for count, of_adapter in parts:
            adapters.append(Adapter.put_together(of_adapter, arrays[start : start + count]))
            start += count
        return cls(tuple(adapters), scales)

    def _draws(self, drop: Drop | Sequence[Drop] | None) -> Sequence[Drop | None]:
        return [drop] * len(self.adapters) if drop is None or callable(drop) else drop


def composed(adapters: Sequence[Adapter], scales: Sequence[float]) -> Adapter | Composition:
    """What acts as these adapters: the adapter itself where it is one of scale 1.

    Args:
        adapters: at least one, all for the same weight.
        scales: of each.
    """
    if len(adapters) == 1 and isinstance(scales[0], (int, float)) and scales[0] == 1:
        return adapters[0]
    return Composition(tuple(adapters), tuple(scales))


def _times(update: Array, scale: float) -> Array:
    return update if isinstance(scale, (int, float)) and scale == 1 else update * scale
