"""What an adapter will bring to a torch module, made or read before anything of the module is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peftarray.backends.torch_kinds import base_weight, layer_of, way_of
from peftarray.backends.torch_layers import AdaptedLayer
from peftarray.backends.torch_saved import SavedModule, TiedHead, TokenRows
from peftarray.backends.torch_tree import at, own_module, own_modules
from torch import nn

from peftarray.adapter import Adapter
from peftarray.errors import ConfigError, MatchError, UnsupportedError, nearest
from peftarray.formats.peft_config import read_config
from peftarray.formats.peft_writer import SavedAdapters, load_adapters
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.model.sites import (
    TOKENS,
    check_training,
    choose,
    heads_among,
    module_here,
    saved_modules,
    start_adapters,
    start_tokens,
    with_heads,
    with_names,
)
from peftarray.targets import is_saved, targeted

__all__ = ["Draft", "load_draft", "start_draft"]


@dataclass(frozen=True)
class Draft:
    """An adapter of a torch module that the module does not have yet.

    Attributes:
        config: with targets and patterns.
        adapters: name of a module, as a file has it -> its adapter.
        saved: module -> the copy that is trained whole.
        tensors: name of a parameter -> the one that takes its place where the adapter acts, such as a trained bias.
        extra: fields of the configuration's file that are not known here.
        is_new: nobody else has its arrays.
    """

    config: AdapterConfig
    adapters: Mapping[str, Adapter]
    saved: Mapping[str, nn.Module] = field(default_factory=dict)
    tensors: Mapping[str, nn.Parameter] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    is_new: bool = False


def start_draft(module: nn.Module, config: AdapterConfig, *, seed: int) -> Draft:
    """A new adapter for a module; nothing of the module is changed.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.
    """
    check_training(config)
    modules = dict(own_modules(module))
    config = with_heads(config, modules)
    layers = _layers(modules, config)
    _refuse_others(modules, layers, config)
    chosen = choose(layers, config, _heads(module, modules))

    def weight(name: str) -> Any:
        return base_weight(modules[name], layers[name])

    adapters = start_adapters((layers[name] for name in chosen), config, weight, seed)
    embeddings = {name: layer for name, layer in layers.items() if not is_saved(name, config)}
    adapters |= start_tokens(embeddings, config, weight, chosen=chosen, embedding=_input_embedding(module, modules))
    saved = _copies(modules, saved_modules(modules, config))
    tensors = {name: _copied(parameter) for name, parameter in _biases(modules, config, adapters, saved)}
    return _checked(module, modules, Draft(with_names(config, chosen), adapters, saved, tensors, is_new=True))


def load_draft(module: nn.Module, source: str | Path | SavedAdapters, *, allow_unknown: bool = False) -> Draft:
    """The adapter in a folder, or a copy of one in memory, for a module; nothing of the module is changed.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.
    """
    if isinstance(source, SavedAdapters):
        config = source.config
    else:
        config = read_config(Path(source), allow_unknown=allow_unknown)
    modules = dict(own_modules(module))
    layers = _layers(modules, config)
    parameters = dict(_tensors(modules))
    weights = dict(parameters)
    weights |= {f"{name}.weight": base_weight(modules[name], layer) for name, layer in layers.items()}
    if isinstance(source, SavedAdapters):
        found = _beside(source, weights)
    else:
        found = load_adapters(source, weights, layers=layers, allow_unknown=allow_unknown)
    adapters = {module_here(path, layers): adapter for path, adapter in found.adapters.items()}
    saved = _copies(modules, saved_modules(modules, config, strict=False))
    tensors = {name: _copied(parameter) for name, parameter in _biases(modules, config, adapters, saved)}
    places = {name: parameter for name, parameter in parameters.items() if isinstance(parameter, nn.Parameter)}
    inside = {f"{path}.{key}": p for path, whole in saved.items() for key, p in whole.named_parameters()}
    for name, array in found.replace.items():
        held = inside.get(name, tensors.get(name, places.get(name)))
        if held is None or held.shape != array.shape:
            has = "nothing" if held is None else tuple(held.shape)
            message = (
                f"{name} is {has} in the model, and {tuple(array.shape)} in the adapter"
                f"{nearest(name, [*places, *inside])}"
            )
            raise MatchError(message)
        if name in inside:
            with torch.no_grad():
                held.copy_(array)
        else:
            tensors[name] = nn.Parameter(array.to(held), requires_grad=False)
    return _checked(module, modules, Draft(found.config, adapters, saved, tensors, found.extra, is_new=True))


def _beside(source: SavedAdapters, weights: Mapping[str, torch.Tensor]) -> SavedAdapters:
    """A copy of an adapter, beside the weights of a module.

    Raises:
        MatchError: an array is missing, or a module.
        ShapeError: an array does not fit.
    """
    copies: dict[int, torch.Tensor] = {}
    adapters = {}
    for name, adapter in source.adapters.items():
        weight = weights.get(f"{name.removesuffix(TOKENS)}.weight")
        if weight is None or tuple(weight.shape) != adapter.layer.stored_shape:
            has = "nothing" if weight is None else tuple(weight.shape)
            message = (
                f"the adapter is for a weight {adapter.layer.stored_shape} of {name}, and the model has {has} there"
            )
            raise MatchError(message)
        adapter.config.check_shapes({key: tuple(array.shape) for key, array in adapter.params.items()}, adapter.layer)
        for array in adapter.params.values():
            if id(array) not in copies:
                copies[id(array)] = _copied_to(array, weight.device)
        adapters[name] = replace(adapter, params={key: copies[id(array)] for key, array in adapter.params.items()})
    whole = {name: _copied_to(array, None) for name, array in source.replace.items()}
    return SavedAdapters(source.config, adapters, whole, source.extra)


def _copied_to(array: Any, device: torch.device | None) -> torch.Tensor:
    found = array.detach() if isinstance(array, torch.Tensor) else array
    return torch.asarray(found, device=device, copy=True)


def _copied(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)


def _copies(modules: Mapping[str, nn.Module], names: list[str]) -> dict[str, nn.Module]:
    for name in names:
        inside = [other for other in modules[name].modules() if isinstance(other, (AdaptedLayer, SavedModule))]
        if inside:
            message = f"modules_to_save names {name}, within which another adapter has a layer; delete that one first"
            raise ConfigError(message)
    return {name: copy.deepcopy(modules[name]).requires_grad_(False) for name in names}


def _biases(
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    adapters: Mapping[str, Adapter],
    saved: Mapping[str, nn.Module],
) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the biases that are trained in their place."""
    wanted = config.trained_biases()
    for name, module in modules.items() if wanted != "none" else ():
        bias = module._parameters.get("bias")
        if bias is None or any(f"{name}.".startswith(f"{other}.") for other in saved):
            continue
        if wanted == "all" or name in adapters:
            yield f"{name}.bias", bias


def _checked(module: nn.Module, modules: Mapping[str, nn.Module], draft: Draft) -> Draft:
    """The draft, where what the module has already leaves room for it.

    Raises:
        ConfigError: another adapter has the place in another way.
        UnsupportedError: a method needs a weight that its layer stores packed.
    """
    for name, adapter in draft.adapters.items():
        path = name.removesuffix(TOKENS)
        way_of(modules[path], adapter.config, adapter.layer)
        there = at(module, path)
        of_rows = path != name
        held = there.base_layer if isinstance(there, AdaptedLayer) else there
        if isinstance(there, SavedModule):
            message = f"{path} is trained whole by another adapter; leave it out of the targets, or delete that one"
            raise ConfigError(message)
        if isinstance(held, TiedHead):
            message = (
                f"{path} follows rows that another adapter trains; leave it out of the targets, or delete that one"
            )
            raise ConfigError(message)
        if isinstance(there, (AdaptedLayer, TokenRows)) and isinstance(there, TokenRows) != of_rows:
            message = (
                f"{path} has an adapter {'on its whole' if of_rows else 'for some rows'}, and the new one is "
                f"{'for some rows' if of_rows else 'on its whole'}; PEFT's names have no place for both on one module"
            )
            raise ConfigError(message)
    for path in draft.saved:
        if isinstance(at(module, path), (AdaptedLayer, TokenRows)):
            message = f"modules_to_save names {path}, which another adapter is on; delete that one first"
            raise ConfigError(message)
    return draft


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what the model's own state dict holds."""
    for name, module in modules.items():
        kept = {key: b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for key, array in {**module._parameters, **kept}.items():
            if array is not None:
                yield f"{name}.{key}" if name else key, array


def _layers(modules: Mapping[str, nn.Module], config: AdapterConfig) -> dict[str, Layer]:
    """Module's name -> its layer, for every module that a method may be on.

    Raises:
        UnsupportedError: a weight is not loaded.
    """
    found = ((name, layer_of(name, module, config)) for name, module in modules.items() if name)
    return {name: layer for name, layer in found if layer is not None}


def _refuse_others(modules: Mapping[str, nn.Module], layers: Mapping[str, Layer], config: AdapterConfig) -> None:
    """Refuse a target that is a module of a kind that no method adapts, such as an attention or a norm."""
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return
    others = [name for name in modules if name and name not in layers]
    try:
        found = targeted(others, config)
    except MatchError:
        return
    message = (
        f"{found[0]} is targeted, and is a {type(modules[found[0]]).__name__}; adapters go on linear layers, "
        "embeddings, convolutions and transformers' Conv1D: name those"
    )
    raise UnsupportedError(message)


def _heads(module: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Output layers, by what the model says or, where it does not, by their names."""
    return _named(module, modules, "get_output_embeddings") or heads_among(modules)


def _input_embedding(module: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    return next(iter(_named(module, modules, "get_input_embeddings")), None)


def _named(module: nn.Module, modules: Mapping[str, nn.Module], question: str) -> set[str]:
    """The names of the module that a model answers a question with."""
    asked = getattr(module, question, None)
    try:
        answer = own_module(asked()) if callable(asked) else None
    except NotImplementedError:
        return set()
    return {name for name, other in modules.items() if other is answer and answer is not None}
