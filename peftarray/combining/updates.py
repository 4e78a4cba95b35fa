"""What an adapter adds to its layer, in the form that LoRA has for the layer: two factors, or a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from peftarray.adapter import Adapter
from peftarray.arrays import Array, device, namespace, thin_product, wide
from peftarray.errors import ConfigError, ShapeError, UnsupportedError
from peftarray.layers import Layer
from peftarray.methods import LoraConfig

__all__ = ["Update", "as_lora", "check_same_layer", "padded", "update_of"]


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter adds to its layer's `(out, fan_in)` matrix, and to its bias.

    Attributes:
        layer: as LoRA sees it.
        factors: `up (out, r)` and `down (r, fan_in)` whose product it is; None where it is no such product.
        matrix: the update itself, where there are no factors.
        bias: `(out,)`, None where the bias stays.
        scale: the number in `up` that the method multiplies its product with.
    """

    layer: Layer
    factors: tuple[Array, Array] | None = None
    matrix: Array | None = None
    bias: Array | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """The inner size of the factors."""
        return None if self.factors is None else int(self.factors[0].shape[1])

    def dense(self) -> Array:
        """The `(out, fan_in)` matrix."""
        return self.matrix if self.factors is None else thin_product(*self.factors)


def update_of(adapter: Adapter, base: Array | None = None) -> Update:
    """What an adapter adds to its layer, computed in float32 at least.

    Args:
        adapter: of any method.
        base: the weight as the model stores it, which methods like DoRA need: what they add depends on it.

    Raises:
        ShapeError: the layer has no entries.
        UnsupportedError: the method needs the base, and none is given, or it changes the bias by what the bias is.
    """
    config, layer = adapter.config, adapter.layer
    if layer.window.groups != 1:
        message = f"{layer.name}: adapters of convolutions with groups cannot be combined; merge them (pa.merge)"
        raise UnsupportedError(message)
    if not layer.out * layer.fan_in:
        message = f"{layer.name} is {layer.shape}, which has no entries; the file is damaged"
        raise ShapeError(message)
    bias = None
    if "bias" in config.touches(layer):
        if config.needs_base():
            message = (
                f"{layer.name}: {type(config).__name__} changes the bias by what the bias is, which no LoRA adapter "
                "holds; merge it (pa.merge)"
            )
            raise UnsupportedError(message)
        like = wide(next(iter(adapter.params.values())))
        bias = adapter.merge_bias(namespace(like).zeros((layer.out,), dtype=like.dtype, device=device(like)))
    factors = adapter.product()
    if factors is not None:
        return Update(_lora_layer(adapter), factors, None, bias, config.scale)
    if config.needs_base() and base is None:
        message = (
            f"{layer.name}: what {_method(adapter)} adds depends on the weight that it is added to; give the base "
            "(base=, or --base)"
        )
        raise UnsupportedError(message)
    added = adapter.update(base)
    # LoRA sees an embedding as a map from one-hot rows; the method may see it as it is stored.
    flips = layer.kind == "embedding" and not config.embedding_transposed
    return Update(_lora_layer(adapter), None, added.mT if flips else added, bias)


def as_lora(up: Array, down: Array, layer: Layer, *, bias: Array | None = None) -> Adapter:
    """The LoRA adapter with these factors and scale 1.

    Args:
        up: `(out, r)`.
        down: `(r, fan_in)`.
        layer: as LoRA sees it.
        bias: what it adds to the bias.
    """
    xp = namespace(up, down)
    rank = int(up.shape[1])
    config = LoraConfig(r=rank, lora_alpha=rank, lora_bias=bias is not None).at(layer.name)
    kernel = layer.kernel
    params = {
        "lora_A": xp.reshape(down, (rank, layer.shape[1], *kernel)) if kernel else down,
        "lora_B": xp.reshape(up, (layer.out, rank, *(1 for _ in kernel))) if kernel else up,
    }
    return Adapter(config, layer, params if bias is None else params | {"lora_B.bias": bias})


def check_same_layer(updates: Sequence[Update]) -> Layer:
    """The layer that all these updates are for.

    Raises:
        ShapeError: they are for layers of several shapes.
    """
    first = updates[0].layer
    for update in updates:
        if (update.layer.kind, update.layer.shape) != (first.kind, first.shape):
            message = (
                f"{first.name} is {first.kind} {first.shape} in one adapter and {update.layer.kind} "
                f"{update.layer.shape} in another; combine adapters of one base"
            )
            raise ShapeError(message)
    return first


def padded(factor: Array, rank: int, axis: int) -> Array:
    """A factor with zeros up to a rank, which leave its product as it is."""
    missing = rank - factor.shape[axis]
    shape = (missing, factor.shape[1]) if axis == 0 else (factor.shape[0], missing)
    xp = namespace(factor)
    return xp.concat([factor, xp.zeros(shape, dtype=factor.dtype, device=device(factor))], axis=axis)


def _lora_layer(adapter: Adapter) -> Layer:
    layer = adapter.layer
    if layer.kind not in LoraConfig.kinds:
        message = f"{layer.name}: LoRA has no meaning on {layer.kind} layers, so there is no adapter to combine into"
        raise ConfigError(message)
    if layer.kind == "embedding" and not adapter.config.embedding_transposed:
        layer = dataclasses.replace(layer, shape=layer.shape[::-1], transposed=True)
    return dataclasses.replace(layer, peers=type(layer.peers)())


def _method(adapter: Adapter) -> str:
    config = adapter.config
    return "DoRA" if isinstance(config, LoraConfig) else type(config).__name__
