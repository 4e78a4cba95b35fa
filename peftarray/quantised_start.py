"""Quantised bases with adapters that start from what quantising lost: LoftQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peftarray import trees
from peftarray.adapter import Adapter
from peftarray.arrays import Array, constant, namespace, to_host
from peftarray.errors import ConfigError, MatchError, ShapeError, UnsupportedError, nearest
from peftarray.inits.loftq import codec_of_bits, loftq_factors, lost_factors, settings_of
from peftarray.methods import LoraConfig
from peftarray.model import PeftModel, get_peft_model
from peftarray.model.adapter_sets import AdapterSet
from peftarray.model.bases import model_type_of, weights_of
from peftarray.quant import Codec
from peftarray.quantised_weight import QuantisedWeight, quantised_weight
from peftarray.quantising import Choice, is_plain, quantised
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["loftq"]


def loftq(
    model: Any,
    config: LoraConfig,
    *,
    originals: str | Path | Mapping[str, Array] | None = None,
    skip: Iterable[str] = (),
    seed: int = 0,
) -> PeftModel:
    """A quantised model with LoRA that starts from what quantising lost: LoftQ.

    `config.loftq_config` is PEFT's: `loftq_bits` 4 (NF4) or 8, and `loftq_iter`. Linear layers that `config` does not
    target are quantised as `quantize` does it. The factors are divided by LoRA's scale, so that base and update are
    close to the weight whatever `lora_alpha` is; PEFT leaves that to who chooses `lora_alpha = r`.

    With `originals` the model is quantised already, by whatever codecs, and stays as it is, so the adapter belongs to a
    base that everybody can make; of the originals one weight at a time is in memory.

    Args:
        model: a mapping of names to float arrays, or an object with such `weights`.
        config: with targets; `init_lora_weights` may be `"loftq"`. What is saved says True: the base that belongs to
            the adapter is the quantised one, `result.base`, which `models.save` writes.
        originals: the weights before they were quantised, as a checkpoint or as a mapping of names to arrays.
        skip: modules that stay as they are, and are not targeted.
        seed: of what is drawn for other layers than linear ones.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.

    Example:
        >>> import numpy as np
        >>> from peftarray import quantize
        >>> weights = {"up.weight": np.random.default_rng(0).standard_normal((64, 64), np.float32)}
        >>> config = LoraConfig(r=8, init_lora_weights="loftq", loftq_config={"loftq_iter": 2}, target_modules=["up"])
        >>> base = quantize(weights, "nf4", double=False)
        >>> both = loftq(weights, config), loftq(base, LoraConfig(r=8, target_modules=["up"]), originals=weights)
        >>> off = [np.linalg.norm(model.effective_weights()["up.weight"] - weights["up.weight"]) for model in both]
        >>> bool(max(off) < np.linalg.norm(base["up.weight"].dense() - weights["up.weight"]))
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
    if originals is None:
        return _quantised_and_started(started, codec_of_bits(bits), iterations, skip)
    if config.loftq_config or skip:
        message = (
            f"loftq_config is {config.loftq_config!r} and skip {list(skip)!r}, which say how a model is quantised; "
            "with originals it is quantised already: leave both out"
        )
        raise ConfigError(message)
    with _opened(originals) as read:
        return _started_beside(started, read)


def _quantised_and_started(started: PeftModel, codec: Codec, iterations: int, skip: Iterable[str]) -> PeftModel:
    model = started.base
    arrays = dict(trees.named(weights_of(model)))
    shapes = {name: tuple(array.shape) for name, array in arrays.items() if is_plain(array)}
    chosen = Choice(codec, skip=skip).among(shapes, model_type_of(model))
    (name,) = started.active_adapters
    found = started.get_adapter(name)
    assert isinstance(found, AdapterSet)  # as LoRA is
    adapters = dict(found.adapters)
    for module, adapter in found.adapters.items():
        tensor = found.sites[module].tensor
        if tensor not in chosen:
            continue
        del chosen[tensor]
        weight, layer = arrays[tensor], adapter.layer
        rank = _lora(adapter).r
        parts, *factors = loftq_factors(weight, codec, rank, iterations=iterations, transposed=layer.transposed)
        arrays[tensor] = quantised_weight(codec, parts, tuple(weight.shape), weight.dtype)
        adapters[module] = _with_factors(adapter, *factors)
    for tensor in chosen:
        arrays[tensor] = quantised(tensor, arrays[tensor], codec)
    tree = trees.refill(weights_of(model), arrays.values())
    base = tree if weights_of(model) is model else replace(model, weights=tree)
    return replace(started, base=base, registry=started.registry.changed(name, replace(found, adapters=adapters)))


def _started_beside(started: PeftModel, read: Callable[[str, tuple[int, ...]], Array]) -> PeftModel:
    """The same model, whose factors make up for what the weights of its base have lost."""
    arrays = dict(trees.named(weights_of(started.base)))
    (name,) = started.active_adapters
    found = started.get_adapter(name)
    assert isinstance(found, AdapterSet)  # as LoRA is
    made = {}
    for module, adapter in found.adapters.items():
        tensor = found.sites[module].tensor
        weight = arrays[tensor]
        if isinstance(weight, QuantisedWeight):
            left = weight.codec.dequantize(weight.parts, weight.stored)
            lost = constant(np.asarray(to_host(read(tensor, weight.stored)), np.float32), left)
            factors = lost_factors(lost, left, _lora(adapter).r, transposed=adapter.layer.transposed)
            made[module] = _with_factors(adapter, *factors)
    if not made:
        message = f"none of the {len(found.adapters)} targets is quantised, so nothing was lost; leave out originals"
        raise ConfigError(message)
    changed = replace(found, adapters={**found.adapters, **made})
    return replace(started, registry=started.registry.changed(name, changed))


@contextmanager
def _opened(originals: str | Path | Mapping[str, Array]) -> Iterator[Callable[[str, tuple[int, ...]], Array]]:
    """What reads a weight by its name, and checks its shape."""
    with ExitStack() as stack:
        known: Any = originals
        if not isinstance(originals, Mapping):
            known = stack.enter_context(Checkpoint.open(originals))

        def read(name: str, shape: tuple[int, ...]) -> Array:
            if name not in known:
                message = f"the originals hold no {name}{nearest(name, known)}; give those that the base was made of"
                raise MatchError(message)
            if tuple(known[name].shape) != shape:
                message = f"the original of {name} has shape {tuple(known[name].shape)}; the base has {shape}"
                raise ShapeError(message)
            return known.read(name) if isinstance(known, Checkpoint) else known[name]

        yield read


def _lora(adapter: Adapter) -> LoraConfig:
    assert isinstance(adapter.config, LoraConfig)
    return adapter.config


def _with_factors(adapter: Adapter, up: Array, down: Array) -> Adapter:
    held = adapter.params["lora_A"].dtype
    xp = namespace(up)
    factors = {"lora_A": xp.astype(down, held), "lora_B": xp.astype(up / _lora(adapter).scale, held)}
    return replace(adapter, params={**adapter.params, **factors})
