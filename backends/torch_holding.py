"""How a torch module gets an adapter and loses it: whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peftarray.backends.torch_arrays import Arrays
from peftarray.backends.torch_budget import Budget
from peftarray.backends.torch_drafts import Draft
from peftarray.backends.torch_layers import AdaptedLayer
from peftarray.backends.torch_saved import SavedModule, TiedHead, TokenRows
from peftarray.backends.torch_switch import Switch
from peftarray.backends.torch_tree import at, chain, own_module, own_modules, put
from torch import nn

from peftarray.adapter import Adapter
from peftarray.formats.peft_writer import SavedAdapters
from peftarray.method import AdapterConfig
from peftarray.model.sites import TOKENS

__all__ = ["Base", "Held", "Place", "attach", "bare", "detach", "exchange", "tied_heads"]


class Base(nn.Module):
    """Holds the module, and what layers share, under PEFT's names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, *arguments: object, **options: object) -> object:
        return self.model(*arguments, **options)

    def share(self, name: str, adapter: Adapter, shared: dict[str, tuple[Arrays, str]]) -> None:
        """Hold what an adapter shares with others, and note where."""
        for key, row in adapter.config.params(adapter.layer).items():
            if row.shared is not None and row.shared not in shared:
                holder = self._modules.get(row.shared)
                if not isinstance(holder, Arrays):
                    holder = Arrays()
                    self.add_module(row.shared, holder)
                holder.put(name, adapter.params[key], row, adapter.trainable)
                shared[row.shared] = (holder, name)

    def drop(self, name: str) -> None:
        """Hold no longer what the layers of an adapter share."""
        for key, holder in list(self._modules.items()):
            if isinstance(holder, Arrays):
                holder.drop(name)
                if not len(holder):
                    del self._modules[key]


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter of the model's own, and what takes its place where an adapter acts.

    Attributes:
        module, key: whose parameter, and under which name.
        own: the model's.
        its: the adapter's.
    """

    module: nn.Module
    key: str
    own: nn.Parameter
    its: nn.Parameter

    def show(self, which: nn.Parameter) -> None:
        """Let the module have one of the two, where and as it has the other."""
        other = self.module._parameters[self.key]
        if other is not None and other is not which and (other.device, other.dtype) != (which.device, which.dtype):
            which.data = which.data.to(other.device, other.dtype)
        self.module._parameters[self.key] = which


@dataclass(frozen=True, eq=False)
class Held:
    """An adapter that a module has.

    Attributes:
        config: with targets and patterns.
        layers: name of a module, as a file has it -> the layer that holds the adapter's arrays for it.
        saved: module -> the one that holds the copy that is trained whole.
        tensors: name of a parameter -> where it lies, more than once where modules share it.
        extra: fields of the configuration's file that are not known here.
        trainable: whether training changes the adapter where it acts.
        parameters: where everything lies that training may change.
        budget: where AdaLoRA's is.
    """

    config: AdapterConfig
    layers: Mapping[str, AdaptedLayer]
    saved: Mapping[str, SavedModule]
    tensors: Mapping[str, tuple[Place, ...]]
    extra: Mapping[str, Any]
    trainable: bool
    parameters: tuple[tuple[dict[str, nn.Parameter | None], str], ...]
    budget: Budget = field(default_factory=Budget)

    def adapters(self, name: str) -> dict[str, Adapter]:
        """Name of a module, as a file has it -> its adapter, for one who keeps and changes nothing."""
        return {module: layer.read(name) for module, layer in self.layers.items()}

    def whole(self, name: str) -> dict[str, nn.Parameter]:
        """Name of a tensor in a file -> what is trained or brought whole."""
        found = {key: places[0].its for key, places in self.tensors.items()}
        for path, module in self.saved.items():
            found |= {f"{path}.{key}": p for key, p in module.modules_to_save[name].named_parameters()}
        return found

    def value(self, name: str) -> SavedAdapters:
        """The adapter as a value, for one who keeps and changes nothing."""
        return SavedAdapters(self.config, self.adapters(name), self.whole(name), self.extra)

    def draft(self, name: str) -> Draft:
        """The adapter by itself, as it could be put on the module again; its arrays are the same."""
        saved = {path: module.modules_to_save[name] for path, module in self.saved.items()}
        tensors = {key: places[0].its for key, places in self.tensors.items()}
        return Draft(self.config, self.adapters(name), saved, tensors, self.extra)

    def let_train(self, wanted: bool) -> None:
        """Let gradients of the adapter be made, or not."""
        for held, key in self.parameters:
            parameter = held[key]
            if parameter is not None:
                parameter.requires_grad = wanted
        for places in self.tensors.values():
            places[0].its.requires_grad = wanted


def attach(base: Base, switch: Switch, name: str, draft: Draft, *, trainable: bool) -> Held:
    """Put an adapter on a module. It does not act yet. Where anything fails, the module is as it was."""
    try:
        return _put_all(base, switch, name, draft, trainable=trainable)
    except BaseException:
        detach(base, name, draft.adapters, draft.saved)
        raise


def exchange(base: Base, switch: Switch, name: str, old: Held, draft: Draft) -> tuple[Held, Exception | None]:
    """Put an adapter in the place of another of the same name; the wrappers of modules that both are on stay.

    Returns:
        The adapter that the module has now, and what went wrong, if that is the old one again.
    """
    before = old.draft(name)
    _drop(base, name, before.adapters, before.saved)
    try:
        found, wrong = _put_all(base, switch, name, draft, trainable=old.trainable), None
    except Exception as error:
        _drop(base, name, draft.adapters, draft.saved)
        found, wrong = _put_all(base, switch, name, before, trainable=old.trainable), error
        found = replace(found, tensors=old.tensors)
    for each in (before, draft):
        _unwrap(base.model, each.adapters, each.saved)
    return found, wrong


def detach(base: Base, name: str, adapted: Iterable[str], saved: Iterable[str]) -> None:
    """Take an adapter from a module, even one that was put there only in part, and the wrappers that held it alone.

    Args:
        base: holds the module.
        name: of the adapter.
        adapted: names of modules, as a file has them.
        saved: modules that it has copies of.
    """
    _drop(base, name, adapted, saved)
    _unwrap(base.model, adapted, saved)


def bare(root: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The module without any wrapper; in place of those that are trained whole, it has the copies of these adapters."""
    for path, module in list(own_modules(root)):
        if not path:
            continue
        there = at(root, path)
        if there is not module:
            put(root, path, own_module(there.of(names)) if isinstance(there, SavedModule) else module)
    return root


def _put_all(base: Base, switch: Switch, name: str, draft: Draft, *, trainable: bool) -> Held:
    root = base.model
    layers: dict[str, AdaptedLayer] = {}
    shared: dict[str, tuple[Arrays, str]] = {}
    for path, adapter in draft.adapters.items():
        still = replace(adapter, trainable=False)
        base.share(name, still, shared)
        layers[path] = _layer_at(root, path, switch)
        layers[path].put(name, still, shared, is_new=draft.is_new)
    saved = {path: _saved_at(root, path, switch) for path in draft.saved}
    for path, module in saved.items():
        module.modules_to_save[name] = draft.saved[path].requires_grad_(False)
    for path, layer in layers.items():
        if path.endswith(TOKENS):
            _tie_heads(root, layer)
    tensors = {key: _places(root, key, its) for key, its in draft.tensors.items()}
    places = [place for layer in layers.values() for place in layer.parameters_of(name)]
    for module in saved.values():
        copied = module.modules_to_save[name]
        places += [(inner._parameters, key) for inner in copied.modules() for key in inner._parameters]
    unique = {(id(held), key): (held, key) for held, key in places}
    return Held(draft.config, layers, saved, tensors, draft.extra, trainable, tuple(unique.values()))


def _drop(base: Base, name: str, adapted: Iterable[str], saved: Iterable[str]) -> None:
    root = base.model
    base.drop(name)
    for path in adapted:
        layer = _adapted_at(root, path)
        if layer is not None:
            layer.drop(name)
    for path in saved:
        there = at(root, path)
        if isinstance(there, SavedModule) and name in there.modules_to_save:
            del there.modules_to_save[name]


def _unwrap(root: nn.Module, adapted: Iterable[str], saved: Iterable[str]) -> None:
    """Take away the wrappers that hold nothing any more."""
    for path in adapted:
        layer = _adapted_at(root, path)
        if layer is not None and not layer.methods:
            _untie_heads(root, layer)
            put(root, path.removesuffix(TOKENS), layer.base_layer)
    for path in saved:
        there = at(root, path)
        if isinstance(there, SavedModule) and not len(there.modules_to_save):
            put(root, path, there.original_module)


def _adapted_at(root: nn.Module, name: str) -> AdaptedLayer | None:
    there = at(root, name.removesuffix(TOKENS))
    layer = there.token_adapter if isinstance(there, TokenRows) else there
    return layer if isinstance(layer, AdaptedLayer) else None


def _layer_at(root: nn.Module, name: str, switch: Switch) -> AdaptedLayer:
    """The layer for the module that a file calls by this name, wrapped if it is not yet."""
    path = name.removesuffix(TOKENS)
    layer = _adapted_at(root, name)
    if layer is not None:
        return layer
    layer = AdaptedLayer(at(root, path), switch)
    put(root, path, layer if path == name else TokenRows(layer))
    return layer


def _saved_at(root: nn.Module, path: str, switch: Switch) -> SavedModule:
    there = at(root, path)
    if not isinstance(there, SavedModule):
        there = SavedModule(there, switch)
        put(root, path, there)
    return there


def _places(root: nn.Module, name: str, its: nn.Parameter) -> tuple[Place, ...]:
    """Everywhere that the model has the parameter of this name."""
    path, _, key = name.rpartition(".")
    own = dict(own_modules(root))[path]._parameters[key]
    assert own is not None
    return tuple(
        Place(module, other, own, its)
        for _, module in own_modules(root)
        for other, parameter in module._parameters.items()
        if parameter is own
    )


def _tie_heads(root: nn.Module, rows: AdaptedLayer) -> None:
    """Let output layers follow the rows that an embedding with the same weight trains."""
    embedding = own_module(rows)
    for path, module in list(own_modules(root)):
        if isinstance(module, nn.Linear) and module.weight is embedding.weight:
            *_, (parent, key, _) = chain(root, path)
            if not isinstance(parent, TiedHead):
                setattr(parent, key, TiedHead(module, rows))


def _untie_heads(root: nn.Module, rows: AdaptedLayer) -> None:
    for parent, key, head in list(tied_heads(root)):
        if head.embedding is rows:
            setattr(parent, key, head.base_layer)


def tied_heads(root: nn.Module) -> Iterator[tuple[nn.Module, str, TiedHead]]:
    """(parent, its name there, output layer) of those that follow an embedding's rows."""
    for path, module in own_modules(root):
        if path and isinstance(module, nn.Linear):
            for parent, key, there in chain(root, path):
                if isinstance(there, TiedHead):
                    yield parent, key, there
