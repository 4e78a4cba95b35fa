"""torch's linear layers with a quantised weight: the codec's parts as buffers in place of the parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from peftarray.quantised_weight import QuantisedWeight, quantised_weight

if TYPE_CHECKING:
    from peftarray.quant import Codec
    from peftarray.quantising import Choice

__all__ = ["QuantisedLinear", "quantize_module"]

_PART = "weight_"


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is stored as the parts of a codec, in buffers `weight_codes`, `weight_absmax`, ...

    `weight` is a `QuantisedWeight` that stands in for the parameter. A state dict has the parts, and goes into a layer
    that is quantised in the same way.

    Attributes:
        codec: how the weight is stored.
    """

    codec: Codec

    def __init__(self, linear: nn.Linear, codec: Codec) -> None:
        nn.Module.__init__(self)  # `nn.Linear` would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.codec = codec
        self.training = linear.training
        self._dtype = linear.weight.dtype
        for name, part in codec.quantize(linear.weight.detach()).items():
            self.register_buffer(_PART + name, part)
        self.bias = linear.bias
        self._parameters["weight"] = None  # where merging puts a weight for a while

    @property
    def weight(self) -> QuantisedWeight | nn.Parameter:  # type: ignore[override]
        """What stands in for the weight, or the one that was merged."""
        merged = self._parameters["weight"]
        return self.quantised if merged is None else merged

    @property
    def quantised(self) -> QuantisedWeight:
        """What stands in for the weight; made now of the buffers, so that it lies where they do."""
        shape = self.out_features, self.in_features
        parts = {name: self._buffers[_PART + name] for name in self.codec.parts(shape)}
        return quantised_weight(self.codec, parts, shape, self._dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`x W^T + b`, a few rows of `W` at a time."""
        merged = self._parameters["weight"]
        if merged is not None:
            return functional.linear(input, merged, self.bias)
        y = self.quantised.mT.after(input)
        return y if self.bias is None else y + self.bias

    def formed(self) -> nn.Linear:
        """A plain layer with the weight as a parameter."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        merged = self._parameters["weight"]
        plain.weight = nn.Parameter(self.quantised.dense(), requires_grad=False) if merged is None else merged
        plain.bias = self.bias
        plain.training = self.training
        return plain

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Codes and scales move, and keep their dtypes; `dtype` is what the weight counts as."""
        kept = {name: part.dtype for name, part in self._buffers.items() if part is not None}
        device = next(part.device for part in self._buffers.values() if part is not None)
        counted = fn(torch.empty(0, dtype=self._dtype, device=device)).dtype
        moved = {name: fn(part) for name, part in self._buffers.items() if part is not None}
        before, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers = {
            # Moved once more from what it was where a cast would have rounded it.
            name: part if part.dtype == kept[name] else before[name].to(part.device)  # type: ignore[union-attr]
            for name, part in moved.items()
        }
        self._dtype = counted
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, codec={self.codec}"


def quantize_module(module: nn.Module, choice: Choice) -> nn.Module:
    """`peftarray.quantize` for a `torch.nn.Module`: its linear layers are replaced in place.

    Layers of a subclass with a `forward` of its own, and those whose weight another module shares, stay as they are.
    """
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(array.shape) for name, array in parameters.items() if array.is_floating_point()}
    owners: dict[int, int] = {}
    for array in parameters.values():
        owners[id(array)] = owners.get(id(array), 0) + 1
    chosen = choice.among(shapes, model_type if isinstance(model_type, str) else None)
    for name, codec in chosen.items():
        path = name.removesuffix(".weight")
        layer = module.get_submodule(path) if path != name else None
        if type(layer) is nn.Linear and owners[id(layer.weight)] == 1:
            parent, _, last = path.rpartition(".")
            setattr(module.get_submodule(parent), last, QuantisedLinear(layer, codec))
    return module
