"""QA-LoRA's merge: the codes and scales of a quantised weight stay, and its zero points take the update."""

from __future__ import annotations

from peftarray.adapter import Adapter
from peftarray.arrays import namespace
from peftarray.errors import ShapeError, UnsupportedError
from peftarray.methods import LoraConfig
from peftarray.quant import MLX
from peftarray.quantised_weight import QuantisedWeight, quantised_weight

__all__ = ["merge_zero_points"]


def merge_zero_points(adapter: Adapter, weight: QuantisedWeight) -> QuantisedWeight:
    """A quantised weight with QA-LoRA merged into it: the same codes and scales, other zero points.

    The update is constant within each group of inputs, so that it moves the zero points of the groups and nothing else.
    The codec keeps them as floating numbers (`scale * zero`, MLX's `bias`), so the merge is exact to their rounding.

    Args:
        adapter: LoRA with `use_qalora`.
        weight: stored by `codec("mlx")`, whose groups lie within those of the adapter.

    Raises:
        UnsupportedError: the adapter is another, or the codec keeps no such zero points.
        ShapeError: a group of the codec has inputs of two groups of the adapter, or the layer has another shape.

    Example:
        >>> import numpy as np
        >>> from peftarray.quant import quantize_array
        >>> base = np.random.default_rng(0).standard_normal((8, 64), np.float32)
        >>> w = quantised_weight(*quantize_array(base, "mlx", group=32), base.shape)
        >>> adapter = LoraConfig(r=2, use_qalora=True, qalora_group_size=32, init_lora_weights=False).init(w)
        >>> merged, x = merge_zero_points(adapter, w), np.ones((1, 64), np.float32)
        >>> bool(np.allclose(x @ merged.T, adapter.forward(x, w), atol=1e-4))
        True
    """
    config, layer, codec = adapter.config, adapter.layer, weight.codec
    if not (isinstance(config, LoraConfig) and config.use_qalora):
        message = f"{layer.name}: zero points take LoRA with use_qalora alone; merge others into the formed weight"
        raise UnsupportedError(message)
    if not isinstance(codec, MLX):
        message = (
            f"{layer.name}: {codec} keeps no zero points as floating numbers, which QA-LoRA's update could move; "
            "quantise the base as codec('mlx')"
        )
        raise UnsupportedError(message)
    if layer.transposed or weight.shape != layer.shape or config.qalora_group_size % codec.group:
        message = (
            f"{layer.name}: a weight {weight.shape} in groups of {codec.group}, and an adapter for {layer.shape} in "
            f"groups of {config.qalora_group_size}, which must be a multiple; quantise with a group that divides it"
        )
        raise ShapeError(message)
    up, down = adapter.prepared["up"], adapter.prepared["down"]
    bias = weight.parts["bias"]
    xp = namespace(bias, up, down)
    # One column of the update stands for each group of the codec.
    moved = xp.astype(xp.astype(bias, up.dtype) + up @ down[:, :: codec.group], bias.dtype)
    return quantised_weight(codec, {**weight.parts, "bias": moved}, weight.stored, weight.dtype)
