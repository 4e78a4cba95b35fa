"""A model with an adapter: the model's weights in a mapping, some of them adapted.

The weights are a pure function of the adapter's arrays, so that any library differentiates a loss of the form
`loss(model.with_params(params).weights, batch)`, and `peftarray.training.fit` trains the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftarray import trees
from peftarray.adapted_weight import adapted
from peftarray.adapter import Adapter
from peftarray.arrays import Array, namespace
from peftarray.bases import backend_of_module, model_type_of, untied_heads, weights_of
from peftarray.draws import dropout
from peftarray.errors import ConfigError, MatchError, NumberError, nearest
from peftarray.formats.peft_config import read_config
from peftarray.formats.peft_writer import load_adapters, save_adapters
from peftarray.formats.prompts import holds_prompt
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.methods.adalora_budget import pruned_adapters
from peftarray.prompted import PromptModel, check_words
from peftarray.prompts import Prompt
from peftarray.quantised_weight import QuantisedWeight
from peftarray.sites import (
    TOKENS,
    Site,
    check_training,
    choose,
    find_sites,
    heads_among,
    module_here,
    saved_modules,
    start_adapters,
    start_tokens,
    with_heads,
    with_names,
)
from peftarray.stand_in import formed
from peftarray.summary import trainable_summary
from peftarray.targets import is_saved

__all__ = ["PeftModel", "get_peft_model", "trainable_summary"]


def get_peft_model(
    model: Any,
    config: AdapterConfig | Prompt,
    *,
    seed: int = 0,
    adapter_name: str = "default",
    layers: Mapping[str, Layer] | None = None,
    token_ids: Sequence[int] | None = None,
) -> Any:
    """A model with a new adapter on the weights that `config` targets.

    Args:
        model: a mapping of names to arrays, or nested ones (as JAX and Flax have them), with any function that uses
            them; an object with such `weights`, as those of `peftarray.models`; or a `torch.nn.Module`.
        config: the method, with `target_modules`; or a soft prompt, for a model of `peftarray.models` or transformers.
        seed: the same seed gives the same adapter on every library.
        adapter_name: what the adapter is called.
        layers: module's name -> its layer, for what a mapping does not say; see `peftarray.sites.find_sites`.
        token_ids: the words that a soft prompt starts from, as the model's tokenizer numbers them.

    Returns:
        A `PeftModel`, or a `PromptModel`; for a torch module, a module that is used like it, with PEFT's names.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoraConfig
        >>> weights = {"up.weight": np.ones((8, 4), np.float32), "down.weight": np.ones((4, 8), np.float32)}
        >>> model = get_peft_model(weights, LoraConfig(r=2, target_modules=["up"]))
        >>> model.print_trainable_parameters()
        trainable params: 24 || all params: 88 || trainable%: 27.2727
        >>> (np.ones((1, 4), np.float32) @ model.weights["up.weight"].T).shape
        (1, 8)
    """
    check_words(config, token_ids)
    tree, named = weights_of(model), {"seed": seed, "adapter_name": adapter_name}
    if tree is None:
        return backend_of_module(model).adapt_module(model, config, **named, token_ids=token_ids)
    if isinstance(config, Prompt):
        return PromptModel.create(model, config, seed=seed, token_ids=token_ids)
    check_training(config)
    arrays = dict(trees.named(tree))
    modules = [name.rpartition(".")[0] for name in arrays]
    config = with_heads(config, modules)
    sites = find_sites(arrays, config, layers or {}, model_type_of(model))
    chosen = choose({name: site.layer for name, site in sites.items()}, config, heads_among(sites))
    saved_modules(modules, config)
    adapters = start_adapters(
        (sites[name].layer for name in chosen), config, lambda name: arrays[sites[name].tensor], seed
    )
    embeddings = {name: site.layer for name, site in sites.items() if not is_saved(name, config)}
    adapters |= start_tokens(embeddings, config, lambda name: arrays[sites[name].tensor], chosen=chosen)
    places = {name: sites[_module(name)] for name in adapters}
    whole = {name: _copied(arrays[name]) for name in _trained_whole(arrays, config, places.values())}
    found = AdapterSet(with_names(config, chosen), adapters, places, whole)
    return PeftModel(model, {adapter_name: found}, adapter_name)


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """One adapter of a model: its configuration, and what it has for each module.

    Attributes:
        config: with targets and patterns.
        adapters: module's name -> its adapter.
        sites: module's name -> its weight.
        whole: tensor's name -> the array that takes its place (`modules_to_save`, trained biases).
        trainable: whether training changes it.
    """

    config: AdapterConfig
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    whole: Mapping[str, Array] = field(default_factory=dict)
    trainable: bool = True


@dataclass(eq=False)
class PeftModel:
    """Weights in a mapping, with an adapter. Nothing in it changes but its `params`, when they are set.

    Attributes:
        base: the mapping, the nested mappings, or the object with `weights`, as they were given.
        sets: name of an adapter -> the adapter.
        active_adapter: the name of the one that `weights` has.
    """

    base: Any
    sets: Mapping[str, AdapterSet]
    active_adapter: str = "default"

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """Name of an adapter -> its configuration."""
        return {name: found.config for name, found in self.sets.items()}

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Module's name -> the active adapter on it."""
        return self._active.adapters

    # The weights.

    @property
    def weights(self) -> Any:
        """The weights in the form of the base's, made now of the present arrays: take them once a step.

        Adapted ones are `AdaptedWeight`s. Dropout is off.
        """
        return self._weights(lambda adapter, base: adapted(adapter, base))

    def training_weights(self, key: Any) -> Any:
        """The same with the method's dropout, drawn by a step's key (`peftarray.draws.step_key`)."""

        def weight(adapter: Adapter, base: Array) -> Any:
            stream = adapter.layer.name
            return adapted(adapter, base, drop=lambda x, share: dropout(x, share, key, stream=stream))

        return self._weights(weight)

    def effective_weights(self) -> Any:
        """The weights in the form of the base's, every one an array: for code that an `AdaptedWeight` cannot serve."""
        merged = self._weights(lambda adapter, base: adapter.merge(base))
        merged = trees.refill(merged, map(formed, trees.leaves(merged)))
        heads = untied_heads(self.base, self.weights)
        return {**merged, **heads} if heads else merged

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The base model, where it is one, on these weights."""
        if not callable(self.base):
            message = "this PeftModel has weights and no model; call your function with model.weights"
            raise ConfigError(message)
        return self.base(self.weights, *arguments, **options)

    # Training.

    @property
    def params(self) -> dict[str, Array]:
        """Name -> array of what training changes: `<module>.<array>`, the tensor's name of what is trained whole, and
        by its own name what layers share. They may be set, all or some.
        """
        found: dict[str, Array] = {}
        for name, module, key in self._trained_arrays():
            found.setdefault(name, self.adapters[module].params[key])
        return found | dict(self._active.whole) if self._active.trainable else found

    @params.setter
    def params(self, params: Mapping[str, Array]) -> None:
        self.sets = self.with_params(params).sets

    def with_params(self, params: Mapping[str, Array]) -> PeftModel:
        """The same model with these in place of arrays of the same names among `params`.

        Raises:
            MatchError: a name is not among them.
        """
        known = self.params
        for name in params:
            if name not in known:
                message = f"{name} is not trained by this model{nearest(name, known)}"
                raise MatchError(message)
        new = {module: dict(adapter.params) for module, adapter in self.adapters.items()}
        for name, module, key in self._trained_arrays():
            if name in params:
                new[module][key] = params[name]
        adapters = {module: replace(adapter, params=new[module]) for module, adapter in self.adapters.items()}
        whole = {name: params.get(name, array) for name, array in self._active.whole.items()}
        return self._with(replace(self._active, adapters=adapters, whole=whole))

    def in_precision(self, dtype: str) -> PeftModel:
        """The same model on a base whose floating-point arrays are in a dtype, such as `"bfloat16"`."""

        def cast(array: Array) -> Array:
            xp = namespace(array)
            if isinstance(array, QuantisedWeight):
                return array.counted_as(getattr(xp, dtype))
            return xp.astype(array, getattr(xp, dtype)) if xp.isdtype(array.dtype, "real floating") else array

        tree = weights_of(self.base)
        weights = trees.refill(tree, [cast(array) for array in trees.leaves(tree)])
        return replace(self, base=weights if self.base is tree else replace(self.base, weights=weights))

    def freeze(self) -> PeftModel:
        """The same model, of which training changes nothing."""
        return self._with(replace(self._active, trainable=False))

    def unfreeze(self) -> PeftModel:
        """The same model, whose adapter training changes."""
        return self._with(replace(self._active, trainable=True))

    def prune(self, keep: Mapping[str, Sequence[bool]]) -> PeftModel:
        """The same model with only these triples of its AdaLoRA adapter, such as an `AdaLoraBudget`'s."""
        config, adapters = pruned_adapters(self._active.config, self.adapters, keep)
        return self._with(replace(self._active, config=config, adapters=adapters))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers training changes, and how many there are."""
        total = sum(math.prod(array.shape) for array in trees.leaves(weights_of(self.base)) if hasattr(array, "shape"))
        seen: dict[int, Array] = {id(a): a for adapter in self.adapters.values() for a in adapter.params.values()}
        seen |= {id(array): array for array in self._active.whole.values()}
        total += sum(math.prod(array.shape) for array in seen.values())
        return sum(math.prod(array.shape) for array in self.params.values()), total

    def print_trainable_parameters(self) -> None:
        """Print how many numbers training changes, as PEFT words it."""
        print(trainable_summary(*self.get_nb_trainable_parameters()))

    # Ends.

    def merge_and_unload(self, safe_merge: bool = False) -> Any:
        """The base with the adapter merged into it, in its own form.

        Args:
            safe_merge: raise where a merged weight is not finite.

        Raises:
            NumberError: as `safe_merge` asks.
        """
        merged = self.effective_weights()
        for name, array in trees.named(merged) if safe_merge else ():
            if namespace(array).isdtype(array.dtype, "real floating"):
                xp = namespace(array)
                if not bool(xp.all(xp.isfinite(array))):
                    message = f"{name} would hold NaN or infinity after merging; the adapter is broken, or its scale is"
                    raise NumberError(message)
        return merged if self.base is weights_of(self.base) else replace(self.base, weights=merged)

    def unload(self) -> Any:
        """The base, as it was given."""
        return self.base

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        An adapter that is not called `"default"` goes to a folder of its name within `folder`.
        """
        place = Path(folder) if self.active_adapter == "default" else Path(folder) / self.active_adapter
        adapted_biases = {site.bias: site.layer.name for site in self._active.sites.values()}
        whole = {
            f"{adapted_biases[name]}.base_layer.bias" if name in adapted_biases else name: array
            for name, array in self._active.whole.items()
        }
        save_adapters(place, self._active.config, self.adapters, replace=whole)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        folder: str | Path,
        *,
        adapter_name: str = "default",
        is_trainable: bool = False,
        layers: Mapping[str, Layer] | None = None,
    ) -> Any:
        """A model with the adapter that PEFT or `save_pretrained` wrote.

        Args:
            model: as for `get_peft_model`.
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            adapter_name: what the adapter is called here.
            is_trainable: whether training changes it.
            layers: as for `get_peft_model`.

        Raises:
            PeftError: of the kind that fits; see `peftarray.errors`.
        """
        tree = weights_of(model)
        if tree is None:
            return backend_of_module(model).load_module(
                model, folder, adapter_name=adapter_name, is_trainable=is_trainable
            )
        if holds_prompt(folder):
            return PromptModel.from_pretrained(model, folder, is_trainable=is_trainable)
        arrays = dict(trees.named(tree))
        config = read_config(Path(folder))
        sites = find_sites(arrays, config, layers or {}, model_type_of(model))
        named = {site.tensor: f"{module}.weight" for module, site in sites.items() if not is_saved(module, config)}
        saved = load_adapters(
            folder,
            {named.get(name, name): array for name, array in arrays.items()},
            layers={module: site.layer for module, site in sites.items()},
        )
        adapters = {module_here(path, sites): adapter for path, adapter in saved.adapters.items()}
        order = {name: place for place, name in enumerate(sites)}
        adapters = dict(sorted(adapters.items(), key=lambda pair: (TOKENS in pair[0], order[_module(pair[0])])))
        places = {name: sites[_module(name)] for name in adapters}
        for name in saved.replace:
            if name not in arrays:
                message = (
                    f"{folder} brings {name}, which the weights do not have{nearest(name, arrays)}; add one to them"
                )
                raise MatchError(message)
        whole = {name: saved.replace[name] for name in arrays if name in saved.replace}
        found = AdapterSet(saved.config, adapters, places, whole, is_trainable)
        return cls(model, {adapter_name: found}, adapter_name)

    # What the above stand on.

    @property
    def _active(self) -> AdapterSet:
        return self.sets[self.active_adapter]

    def _trained_arrays(self) -> Iterator[tuple[str, str, str]]:
        """(name in `params`, module, name in the adapter) of every array of the method that is trained."""
        for module, adapter in self.adapters.items() if self._active.trainable else ():
            for key, row in adapter.config.params(adapter.layer).items():
                if not row.frozen:
                    yield row.shared or f"{module}.{key}", module, key

    def _weights(self, make: Callable[[Adapter, Array], Any]) -> Any:
        tree = weights_of(self.base)
        arrays = dict(trees.named(tree)) | dict(self._active.whole)
        for module, site in self._active.sites.items():
            adapter, base = self.adapters[module], arrays[site.tensor]
            if site.bias is not None and "bias" in adapter.config.touches(adapter.layer):
                bias = arrays[site.bias]
                changed = adapter.merge_bias(bias, base)
                arrays[site.bias] = changed if changed.dtype == bias.dtype else _cast(changed, bias)
            if "weight" in adapter.config.touches(adapter.layer):
                arrays[site.tensor] = make(adapter, base)
        return trees.refill(tree, arrays.values())

    def _with(self, changed: AdapterSet) -> PeftModel:
        return replace(self, sets={**self.sets, self.active_adapter: changed})


def _module(name: str) -> str:
    """The module that an adapter is on, from its key."""
    return name.removesuffix(TOKENS)


def _trained_whole(arrays: Mapping[str, Array], config: AdapterConfig, sites: Iterable[Site]) -> list[str]:
    """The tensors that are trained whole beside the adapter."""
    biases = config.trained_biases()
    of_layers = {site.bias for site in sites}

    def is_trained(name: str) -> bool:
        module, _, last = name.rpartition(".")
        if is_saved(module, config):
            return True
        return last == "bias" and (biases == "all" or (biases == "adapted" and name in of_layers))

    return [name for name in arrays if is_trained(name)]


def _copied(array: Array) -> Array:
    return namespace(array).asarray(array, copy=True)


def _cast(array: Array, like: Array) -> Array:
    return namespace(array).astype(array, like.dtype)
