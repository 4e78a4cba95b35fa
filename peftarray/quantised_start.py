"""Adapters and quantised bases that belong together: LoftQ's start, and QA-LoRA's merge into zero points."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from peftarray import trees
from peftarray.adapter import Adapter
from peftarray.arrays import namespace
from peftarray.bases import model_type_of, weights_of
from peftarray.errors import ConfigError, ShapeError, UnsupportedError
from peftarray.inits.loftq import codec_of_bits, loftq_factors, settings_of
from peftarray.methods import LoraConfig
from peftarray.model import PeftModel, get_peft_model
from peftarray.quant import MLX
from peftarray.quantised_weight import QuantisedWeight, quantised_weight
from peftarray.quantising import Choice, is_plain, quantised

__all__ = ["loftq", "merge_zero_points"]


def loftq(model: Any, config: LoraConfig, *, skip: Iterable[str] = (), seed: int = 0) -> PeftModel:
    """A quantised model with LoRA that starts from what quantising lost: LoftQ.

    `config.loftq_config` is PEFT's: `loftq_bits` 4 (NF4) or 8, and `loftq_iter`. Linear layers that `config` does not
    target are quantised as `quantize` does it. The factors are divided by LoRA's scale, so that base and update are
    close to the weight whatever `lora_alpha` is; PEFT leaves that to who chooses `lora_alpha = r`.

    Args:
        model: a mapping of names to float arrays, or an object with such `weights`.
        config: with targets; `init_lora_weights` may be `"loftq"`. What is saved says True: the base that belongs to
            the adapter is the quantised one, `result.base`, which `models.save` writes.
        skip: modules that stay as they are, and are not targeted.
        seed: of what is drawn for other layers than linear ones.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.

    Example:
        >>> import numpy as np
        >>> weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
        >>> config = LoraConfig(r=8, init_lora_weights="loftq", loftq_config={"loftq_iter": 2}, target_modules=["up"])
        >>> model = loftq({"up.weight": weight}, config)
        >>> off = np.linalg.norm(model.effective_weights()["up.weight"] - weight)
        >>> bool(off < np.linalg.norm(model.base["up.weight"].dense() - weight))
        True
    """
    bits, iterations = settings_of(config.loftq_config)
    plain = replace(config, init_lora_weights=True, loftq_config=None)
    if weights_of(model) is None:
        message = f"the model is a {type(model).__name__}; LoftQ is for mappings of names to arrays, and what has such"
        raise ConfigError(message)
    if not plain.product_alone:
        message = "LoftQ starts the factors of plain LoRA; leave out use_dora, use_bdlora, use_qalora and kasa_config"
        raise UnsupportedError(message)
    started = get_peft_model(model, plain, seed=seed)
    arrays = dict(trees.named(weights_of(model)))
    codec = codec_of_bits(bits)
    shapes = {name: tuple(array.shape) for name, array in arrays.items() if is_plain(array)}
    chosen = Choice(codec, skip=skip).among(shapes, model_type_of(model))
    (name, found), *_ = started.sets.items()
    adapters = dict(found.adapters)
    for module, adapter in found.adapters.items():
        tensor = found.sites[module].tensor
        if tensor not in chosen:
            continue
        del chosen[tensor]
        arrays[tensor], adapters[module] = _start(arrays[tensor], adapter, iterations, codec)
    for tensor in chosen:
        arrays[tensor] = quantised(tensor, arrays[tensor], codec)
    tree = trees.refill(weights_of(model), arrays.values())
    base = tree if weights_of(model) is model else replace(model, weights=tree)
    return replace(started, base=base, sets={name: replace(found, adapters=adapters)})


def _start(weight: Any, adapter: Adapter, iterations: int, codec: Any) -> tuple[QuantisedWeight, Adapter]:
    config, layer = adapter.config, adapter.layer
    assert isinstance(config, LoraConfig)
    parts, up, down = loftq_factors(weight, codec, config.r, iterations=iterations, transposed=layer.transposed)
    held = adapter.params["lora_A"].dtype
    xp = namespace(up)
    params = {**adapter.params, "lora_A": xp.astype(down, held), "lora_B": xp.astype(up / config.scale, held)}
    return quantised_weight(codec, parts, tuple(weight.shape), weight.dtype), replace(adapter, params=params)


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
