"""Adapters of a model in memory, written to a folder and read from one, in PEFT's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftarray import trees
from peftarray.arrays import Array, sealed
from peftarray.errors import MatchError, nearest
from peftarray.formats.peft import open_weights
from peftarray.formats.peft_config import read_config
from peftarray.formats.peft_writer import load_adapters, save_adapters
from peftarray.formats.prompts import holds_prompt, read_prompt_config, save_prompt
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.model.adapter_sets import AdapterSet, Loaded, PromptSet
from peftarray.model.bases import model_type_of, weights_of
from peftarray.model.creation import module_of
from peftarray.model.prompted import PromptModel
from peftarray.model.sites import TOKENS, find_sites, module_here
from peftarray.prompts import Prompt
from peftarray.targets import is_saved

__all__ = ["adapter_folder", "check_folder", "load_adapter", "save_adapter"]

_DEFAULT = "default"


def adapter_folder(folder: str | Path, name: str) -> Path:
    """Where PEFT keeps the adapter of a name: `default` in the folder itself, others in a folder of their name."""
    return Path(folder) if name == _DEFAULT else Path(folder) / name


def save_adapter(folder: Path, found: Loaded) -> None:
    """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        OutputError: the folder cannot be written.
    """
    if isinstance(found, PromptSet):
        save_prompt(folder, found.config, found.values, replace=found.whole, extra=found.extra)
        return
    adapted_biases = {site.bias: site.layer.name for site in found.sites.values()}
    whole = {
        f"{adapted_biases[name]}.base_layer.bias" if name in adapted_biases else name: array
        for name, array in found.whole.items()
    }
    save_adapters(folder, found.config, found.adapters, replace=whole, extra=found.extra)


def load_adapter(
    model: Any, folder: Path, *, layers: Mapping[str, Layer], trainable: bool = False, allow_unknown: bool = False
) -> Loaded:
    """The adapter that PEFT or `save_adapter` wrote, for a model.

    Args:
        model: a tree of arrays, or an object that has one.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        layers: module's name -> its layer, for what the arrays do not say.
        trainable: whether training changes it.
        allow_unknown: pass over fields of the configuration that are not known here and are set; they are kept.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.
    """
    if holds_prompt(folder):
        made = PromptModel.from_pretrained(model, folder, is_trainable=trainable)
        return PromptSet(made.config, made.arrays, made.whole, trainable, made.extra)
    arrays = dict(trees.named(weights_of(model)))
    config = read_config(folder, allow_unknown=allow_unknown)
    sites = find_sites(arrays, config, layers, model_type_of(model))
    named = {site.tensor: f"{module}.weight" for module, site in sites.items() if not is_saved(module, config)}
    saved = load_adapters(
        folder,
        {named.get(name, name): array for name, array in arrays.items()},
        layers={module: site.layer for module, site in sites.items()},
        allow_unknown=allow_unknown,
    )
    adapters = {module_here(path, sites): adapter for path, adapter in saved.adapters.items()}
    order = {name: place for place, name in enumerate(sites)}
    adapters = dict(sorted(adapters.items(), key=lambda pair: (TOKENS in pair[0], order[module_of(pair[0])])))
    places = {name: sites[module_of(name)] for name in adapters}
    _check_known(saved.replace, arrays, folder)
    whole = {name: saved.replace[name] for name in arrays if name in saved.replace}
    found = AdapterSet(saved.config, adapters, places, whole, trainable, saved.extra)
    return found if trainable else found.moved(sealed)


def check_folder(folder: Path, *, allow_unknown: bool = False) -> AdapterConfig | Prompt:
    """The configuration in a folder, whose files are there and have sound headers.

    Raises:
        PeftError: of the kind that fits.
    """
    if holds_prompt(folder):
        config: AdapterConfig | Prompt = read_prompt_config(folder, allow_unknown=allow_unknown)
    else:
        config = read_config(folder, allow_unknown=allow_unknown)
    open_weights(folder)
    return config


def _check_known(replace: Mapping[str, Array], arrays: Mapping[str, Array], folder: Path) -> None:
    for name in replace:
        if name not in arrays:
            message = f"{folder} brings {name}, which the weights do not have{nearest(name, arrays)}; add one to them"
            raise MatchError(message)
