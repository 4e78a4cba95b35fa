"""What a method knows of torch's layers, and how the output of each is made with an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from peftarray.arrays import Array
from peftarray.errors import UnsupportedError
from peftarray.layers import Kind, Layer, Window
from peftarray.method import AdapterConfig

__all__ = ["Way", "base_weight", "is_packed", "layer_of", "way_of", "ways"]

Way = Literal["apart", "instead", "within"]
"""How the layer's output is made: the update `"apart"` and added, the method's path `"instead"` of the layer's own, or
the layer's own, which does what no method knows of, on the effective weight (`"within"`)."""

_FORWARDS = tuple(kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding))
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_of(name: str, module: Any, config: AdapterConfig) -> Layer | None:
    """What a method knows of a module, None where it is of no kind that methods adapt."""
    kind: Kind = "linear"
    flip, window = False, Window()
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
    elif _is_conv1d(module):
        shape, flip = tuple(module.weight.shape[::-1]), True
    elif isinstance(module, nn.Embedding):
        kind, flip = "embedding", config.embedding_transposed
        shape = (module.num_embeddings, module.embedding_dim)[:: -1 if flip else 1]
    elif isinstance(module, _CONVOLUTIONS):
        kind, shape, window = "conv", tuple(module.weight.shape), _window(module)
    else:
        return None
    has_bias = kind != "embedding" and module.bias is not None
    return Layer(name, kind, shape, flip, has_bias, window, str(module.weight.dtype).rpartition(".")[2])


def base_weight(module: Any, layer: Layer) -> Array:
    """The weight beside which an adapter is made; where the module stores it packed, one of zeros without memory.

    Raises:
        UnsupportedError: the weight is not loaded.
    """
    weight = module.weight
    if weight.is_meta:
        message = f"the weight of {layer.name} is on the meta device; load the model's weights first"
        raise UnsupportedError(message)
    if is_packed(module, layer):
        return torch.zeros((), device=weight.device).expand(layer.stored_shape)
    return weight.detach()


def way_of(base: Any, method: AdapterConfig, layer: Layer) -> Way:
    """How a layer's output is made with a method.

    Raises:
        UnsupportedError: the method needs a weight that the layer stores packed.
    """
    if isinstance(base, _CONVOLUTIONS):
        is_plain = base.padding_mode == "zeros" and not isinstance(base.padding, str)
    else:
        is_plain = not isinstance(base, nn.Embedding) or base.max_norm is None
    is_plain = is_plain and (type(base).forward in _FORWARDS or _is_conv1d(base))
    packed = is_packed(base, layer)
    if method.adds_apart() and (is_plain or packed):
        return "apart"
    if packed:
        message = (
            f"{layer.name}: {type(method).__name__} needs the weight, and this {type(base).__name__} stores it "
            "packed; use a method that adds to the output, such as LoRA"
        )
        raise UnsupportedError(message)
    # Hooks, such as those that move a model's inputs between devices, run with the layer.
    is_hooked = bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
    return "instead" if is_plain and not is_hooked else "within"


def ways(found: Mapping[str, Way], names: tuple[str, ...]) -> Way:
    """How a layer's output is made with several adapters: the way that serves all of them."""
    mine = {found[name] for name in names}
    return "within" if "within" in mine else "instead" if "instead" in mine else "apart"


def _is_conv1d(module: Any) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is stored `(in, out)`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_packed(module: Any, layer: Layer) -> bool:
    """Whether a module stores its weight in another form than a method's."""
    weight = module.weight
    return tuple(weight.shape) != layer.stored_shape or not bool(weight.is_floating_point())


def _window(module: Any) -> Window:
    padding = 0 if isinstance(module.padding, str) else tuple(module.padding)
    return Window(tuple(module.stride), padding, tuple(module.dilation), module.groups)
