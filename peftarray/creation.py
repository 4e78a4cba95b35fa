"""The adapter that training starts from, for a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftarray import trees
from peftarray.adapter_sets import AdapterSet, Loaded, PromptSet
from peftarray.arrays import Array, namespace
from peftarray.bases import model_type_of, weights_of
from peftarray.combining import Recipe, combine_sets
from peftarray.errors import UnsupportedError
from peftarray.formats.peft_writer import SavedAdapters
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.prompted import PromptModel
from peftarray.prompts import Prompt
from peftarray.sites import (
    TOKENS,
    Site,
    check_training,
    choose,
    find_sites,
    heads_among,
    saved_modules,
    start_adapters,
    start_tokens,
    with_heads,
    with_names,
)
from peftarray.targets import is_saved

__all__ = ["combined", "module_of", "new_adapter"]


def new_adapter(model: Any, config: AdapterConfig | Prompt, *, seed: int, layers: Mapping[str, Layer]) -> Loaded:
    """A new adapter for a model: a method on the weights that the configuration targets, or a prompt.

    Args:
        model: a tree of arrays, or an object that has one.
        config: with targets, or a prompt.
        seed: of all draws.
        layers: module's name -> its layer, for what the arrays do not say.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.
    """
    if isinstance(config, Prompt):
        made = PromptModel.create(model, config, seed=seed)
        return PromptSet(made.config, made.arrays, made.whole)
    check_training(config)
    arrays = dict(trees.named(weights_of(model)))
    modules = [name.rpartition(".")[0] for name in arrays]
    config = with_heads(config, modules)
    sites = find_sites(arrays, config, layers, model_type_of(model))
    chosen = choose({name: site.layer for name, site in sites.items()}, config, heads_among(sites))
    saved_modules(modules, config)
    adapters = start_adapters(
        (sites[name].layer for name in chosen), config, lambda name: arrays[sites[name].tensor], seed
    )
    embeddings = {name: site.layer for name, site in sites.items() if not is_saved(name, config)}
    adapters |= start_tokens(embeddings, config, lambda name: arrays[sites[name].tensor], chosen=chosen)
    places = {name: sites[module_of(name)] for name in adapters}
    whole = {name: _copied(arrays[name]) for name in _trained_whole(arrays, config, places.values())}
    return AdapterSet(with_names(config, chosen), adapters, places, whole)


def combined(sets: Mapping[str, Loaded], weights: Sequence[float], recipe: Recipe, tree: Any) -> AdapterSet:
    """The LoRA adapter that stands for several of a model.

    Args:
        sets: name -> adapter.
        weights: one for each.
        recipe: how they are combined.
        tree: the model's arrays.

    Raises:
        UnsupportedError: one is a prompt, or cannot be combined.
    """
    saved: list[SavedAdapters] = []
    sites: dict[str, Site] = {}
    for name, found in sets.items():
        if isinstance(found, PromptSet):
            message = f"{name} is a prompt, and a prompt is no update of weights; combine adapters of weights"
            raise UnsupportedError(message)
        saved.append(SavedAdapters(found.config, found.adapters, found.whole))
        sites |= found.sites
    arrays = dict(trees.named(tree))
    made = combine_sets(
        saved, weights, recipe, base=lambda module, _: arrays[sites[module].tensor], names=list(sets)
    ).saved
    places = {module: sites[module] for module in made.adapters}
    return AdapterSet(made.config, made.adapters, places, made.replace, trainable=False)


def module_of(name: str) -> str:
    """The module that an adapter is on, from its name among those of an `AdapterSet`."""
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
