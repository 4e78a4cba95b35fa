"""torch's modules with an adapter: `get_peft_model` and `PeftModel.from_pretrained` for a `torch.nn.Module`.

The model's layers are wrapped in place, as PEFT does it, and its state dict has PEFT's names: `base_model.model.`
before the names of the model, `base_layer` and the adapter's name within them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peftarray.backends.torch_adalora import Budgeted
from peftarray.backends.torch_layers import (
    AdaptedLayer,
    Arrays,
    SavedModule,
    TiedHead,
    TokenRows,
    base_weight,
    layer_of,
)
from torch import nn

from peftarray.adapter import Adapter
from peftarray.errors import ConfigError, MatchError, UnsupportedError, nearest
from peftarray.formats.peft_config import read_config
from peftarray.formats.peft_writer import load_adapters, save_adapters
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.model import trainable_summary
from peftarray.sites import (
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

__all__ = ["PeftModule", "adapt_module", "load_module"]


def adapt_module(
    module: nn.Module, config: AdapterConfig, *, seed: int = 0, adapter_name: str = "default"
) -> PeftModule:
    """A module with a new adapter; `peftarray.get_peft_model` says the rest."""
    check_training(config)
    modules = dict(module.named_modules())
    config = with_heads(config, modules)
    layers = _layers(modules, config)
    _refuse_others(modules, layers, config)
    chosen = choose(layers, config, _heads(module, modules))
    weights = {name: base_weight(modules[name], layer) for name, layer in layers.items()}
    adapters = start_adapters((layers[name] for name in chosen), config, weights.__getitem__, seed)
    embeddings = {name: layer for name, layer in layers.items() if not is_saved(name, config)}
    adapters |= start_tokens(
        embeddings, config, weights.__getitem__, chosen=chosen, embedding=_input_embedding(module, modules)
    )
    saved = saved_modules(modules, config)
    return PeftModule(module, with_names(config, chosen), adapters, saved, adapter_name, trainable=True)


def load_module(
    module: nn.Module, folder: str | Path, *, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModule:
    """A module with the adapter in a folder; `peftarray.PeftModel.from_pretrained` says the rest."""
    config = read_config(Path(folder))
    modules = dict(module.named_modules())
    layers = _layers(modules, config)
    weights: dict[str, Any] = {name: array.detach() for name, array in module.state_dict(keep_vars=True).items()}
    weights |= {f"{name}.weight": base_weight(modules[name], layer) for name, layer in layers.items()}
    found = load_adapters(folder, weights, layers=layers)
    saved = saved_modules(modules, config, strict=False)
    adapters = {module_here(path, layers): adapter for path, adapter in found.adapters.items()}
    model = PeftModule(module, config, adapters, saved, adapter_name, trainable=is_trainable)
    model.replace(found.replace)
    return model


class PeftModule(Budgeted):
    """A module with an adapter: it is used like the module, and trained like any other.

    Attributes:
        base_model: holds the module as `model`, and what layers share.
        peft_config: name of an adapter -> its configuration.
        active_adapter: the name of the one that acts.
    """

    def __init__(
        self,
        module: nn.Module,
        config: AdapterConfig,
        adapters: Mapping[str, Adapter],
        saved: list[str],
        adapter_name: str,
        *,
        trainable: bool,
    ) -> None:
        super().__init__()
        if "." in adapter_name or not adapter_name:
            message = f"adapter_name is {adapter_name!r}; it must be a name without dots"
            raise ConfigError(message)
        self.base_model = _Base(module)
        self.training = module.training
        self.peft_config = {adapter_name: config}
        self.active_adapter = adapter_name
        self._names = {adapter_name: tuple(adapters)}
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        embeddings = {module.get_submodule(name.removesuffix(TOKENS)): name for name in adapters if TOKENS in name}
        shared: dict[str, tuple[Arrays, str]] = {}
        for name, adapter in adapters.items():
            trained = Adapter(adapter.config, adapter.layer, adapter.params, trainable)
            self.base_model.share(adapter_name, trained, shared)
            _wrap(module, name, adapter_name, trained, shared)
        for name in saved:
            _save_whole(module, name, adapter_name, trainable)
        self._tie_heads(module, embeddings)
        self._train_biases(config, trainable)
        # What a training loop looks for in the arguments of `forward` is in those of the module's.
        self.forward = _signed(type(self).forward, module, self)  # type: ignore[method-assign]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the module makes, adapted."""
        return self.base_model.model(*arguments, **options)

    def get_base_model(self) -> nn.Module:
        """The module, with its wrapped layers."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers training changes, and how many there are."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers training changes, as PEFT words it."""
        print(trainable_summary(*self.get_nb_trainable_parameters()))

    def freeze(self) -> PeftModule:
        """Let training change nothing."""
        return self._set_trained(False)

    def unfreeze(self) -> PeftModule:
        """Let training change the adapter again."""
        return self._set_trained(True)

    def merge_and_unload(self, safe_merge: bool = False) -> nn.Module:
        """The module with the adapter merged into its weights, in place.

        Args:
            safe_merge: raise where a merged weight is not finite.

        Raises:
            NumberError: as `safe_merge` asks.
        """
        with torch.no_grad():
            model = self._unwrapped(lambda layer: layer.merged(safe_merge), lambda saved: saved.current)
        _settle_ties(model)
        return model

    def unload(self) -> nn.Module:
        """The module as it was."""
        return self._unwrapped(lambda layer: layer.base_layer, lambda saved: saved.original_module)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        An adapter that is not called `"default"` goes to a folder of its name within the directory.
        """
        name = self.active_adapter
        folder = Path(save_directory) if name == "default" else Path(save_directory) / name
        config, adapters = self._within_budget()
        whole = {key: parameter.detach() for key, parameter in self._whole()}
        save_adapters(folder, config, adapters, replace=whole)

    def replace(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Give what is trained whole the values that a file brings.

        Raises:
            MatchError: a tensor has no place.
        """
        places = {_plain(name): parameter for name, parameter in self.base_model.model.named_parameters()}
        for name, parameter in self._whole():
            places[_plain(name)] = parameter
        for name, array in whole.items():
            if name not in places or places[name].shape != array.shape:
                found = tuple(places[name].shape) if name in places else "nothing"
                message = (
                    f"{name} is {found} in the model, and {tuple(array.shape)} in the adapter{nearest(name, places)}"
                )
                raise MatchError(message)
            with torch.no_grad():
                places[name].copy_(array)

    def __getattr__(self, name: str) -> Any:
        """What this module has, or else what the module has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def _adapted(self) -> Iterator[tuple[str, AdaptedLayer]]:
        """(name in a file, layer) of what the active adapter is on."""
        for name in self._names[self.active_adapter]:
            yield name, self.base_model.model.get_submodule(name)  # type: ignore[misc]

    def _whole(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in a file, parameter) of what is trained beside the method's own arrays."""
        name, model = self.active_adapter, self.base_model.model
        for path, module in model.named_modules():
            if isinstance(module, SavedModule):
                yield from ((f"{path}.{key}", p) for key, p in module.modules_to_save[name].named_parameters())
        wanted = self.peft_config[name].trained_biases()
        for path, module in model.named_modules() if wanted != "none" else ():
            bias = module._parameters.get("bias")
            is_copy = any(word in path.split(".") for word in ("modules_to_save", "original_module"))
            if bias is None or is_copy or isinstance(module, Arrays):
                continue
            if wanted == "all" or path.endswith(".base_layer"):
                yield f"{path}.bias", bias

    def _train_biases(self, config: AdapterConfig, trainable: bool) -> None:
        if config.trained_biases() != "none":
            for _, parameter in self._whole():
                parameter.requires_grad_(trainable)

    def _set_trained(self, trainable: bool) -> PeftModule:
        for _, layer in self._adapted():
            for child in layer.children():
                if child is not layer.base_layer:
                    child.requires_grad_(trainable)
        for module in self.base_model.children():
            if module is not self.base_model.model:
                module.requires_grad_(trainable)
        for _, parameter in self._whole():
            parameter.requires_grad_(trainable)
        return self

    @staticmethod
    def _tie_heads(module: nn.Module, embeddings: Mapping[nn.Module, str]) -> None:
        """Let output layers follow the rows that an embedding with the same weight trains."""
        for embedding, name in embeddings.items():
            rows = module.get_submodule(name)
            for path, other in list(module.named_modules()):
                if isinstance(other, nn.Linear) and other.weight is embedding.weight:
                    _put(module, path, TiedHead(other, rows))  # type: ignore[arg-type]

    def _unwrapped(self, layer: Any, saved: Any) -> nn.Module:
        model = self.base_model.model
        # Tied heads come last: they take what their embeddings have then.
        for path, module in sorted(model.named_modules(), key=lambda pair: isinstance(pair[1], TiedHead)):
            if isinstance(module, AdaptedLayer) and not path.endswith(TOKENS):
                _put(model, path, layer(module))
            elif isinstance(module, TokenRows):
                _put(model, path, layer(module.token_adapter))
            elif isinstance(module, TiedHead):
                module.base_layer.weight = module.embedding.weight
                _put(model, path, module.base_layer)
            elif isinstance(module, SavedModule):
                _put(model, path, saved(module))
        return model


class _Base(nn.Module):
    """Holds the module, and what layers share, under PEFT's names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def share(self, name: str, adapter: Adapter, shared: dict[str, tuple[Arrays, str]]) -> None:
        """Hold what an adapter shares with others, and note where."""
        for key, row in adapter.config.params(adapter.layer).items():
            if row.shared is not None and row.shared not in shared:
                if row.shared not in dict(self.named_children()):
                    self.add_module(row.shared, Arrays())
                holder = self.get_submodule(row.shared)
                assert isinstance(holder, Arrays)
                holder.put(name, adapter.params[key], row, adapter.trainable)
                shared[row.shared] = (holder, name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.model(*arguments, **options)


def _layers(modules: Mapping[str, nn.Module], config: AdapterConfig) -> dict[str, Layer]:
    """Module's name -> its layer, for every module that a method may be on.

    Raises:
        ConfigError: the model has an adapter already.
        UnsupportedError: a weight is not loaded.
    """
    found = {}
    for name, module in modules.items():
        if isinstance(module, (PeftModule, AdaptedLayer)):
            message = "the model has an adapter already; unload or merge it first"
            raise ConfigError(message)
        layer = layer_of(name, module, config) if name else None
        if layer is not None:
            found[name] = layer
    return found


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
    asked = getattr(module, "get_output_embeddings", None)
    head = asked() if callable(asked) else None
    found = {name for name, other in modules.items() if other is head and head is not None}
    return found or heads_among(modules)


def _input_embedding(module: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    asked = getattr(module, "get_input_embeddings", None)
    try:
        embedding = asked() if callable(asked) else None
    except NotImplementedError:
        return None
    return next((name for name, other in modules.items() if other is embedding and embedding is not None), None)


def _wrap(
    module: nn.Module, name: str, adapter_name: str, adapter: Adapter, shared: Mapping[str, tuple[Arrays, str]]
) -> None:
    """Put an adapter on the module that a file calls `name`."""
    path = name.removesuffix(TOKENS)
    layer = AdaptedLayer(module.get_submodule(path))
    layer.add(adapter_name, adapter, shared)
    _put(module, path, layer if path == name else TokenRows(layer))


def _save_whole(module: nn.Module, name: str, adapter_name: str, trainable: bool) -> None:
    saved = SavedModule(module.get_submodule(name))
    saved.modules_to_save[adapter_name] = copy.deepcopy(saved.original_module).requires_grad_(trainable)
    saved.active = adapter_name
    _put(module, name, saved)


def _put(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)


def _plain(name: str) -> str:
    """A parameter's name in the model without wrappers."""
    return ".".join(word for word in name.split(".") if word != "base_layer")


def _settle_ties(module: Any) -> None:
    """Let a model that no longer ties its head to its embedding say so, or it would tie them when it is loaded."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "tie_word_embeddings", None) is True:
        head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
        if head is not None and head.weight is not embedding.weight:
            config.tie_word_embeddings = False


def _signed(function: Any, module: nn.Module, owner: Any) -> MethodType:
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        return function(self, *arguments, **options)

    signature = inspect.signature(module.forward)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    return MethodType(forward, owner)
