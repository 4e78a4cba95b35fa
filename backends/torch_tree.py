"""The modules of a model that adapters are on, seen as they were before."""

from __future__ import annotations

from collections.abc import Iterator

from peftarray.backends.torch_layers import AdaptedLayer
from peftarray.backends.torch_saved import SavedModule, TiedHead, TokenRows
from torch import nn

__all__ = ["at", "chain", "own_module", "own_modules", "put"]


def own_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the model's own modules, in its order and under the names that they had: what adapters are on
    is seen through, and what they brought is passed over.
    """
    yield from _walk("", root, set())


def own_module(module: nn.Module) -> nn.Module:
    """The module of the model's own that another stands for."""
    while key := _inner(module):
        module = module._modules[key]  # type: ignore[assignment]
    return module


def at(root: nn.Module, path: str) -> nn.Module:
    """What is in a module's place now."""
    parent, _, name = path.rpartition(".")
    found = root.get_submodule(parent)._modules[name]
    assert found is not None
    return found


def chain(root: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, its name there, module) of what is in a module's place, from the outermost to the model's own."""
    above, _, key = path.rpartition(".")
    parent = root.get_submodule(above)
    while True:
        there = parent._modules[key]
        assert there is not None
        yield parent, key, there
        parent, key = there, _inner(there)
        if not key:
            return


def put(root: nn.Module, path: str, child: nn.Module) -> None:
    """Put a module into another's place."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, child)


def _walk(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    # As in `named_modules`, a module that stands in two places has the name of the first.
    own = own_module(module)
    if id(own) in seen:
        return
    seen.add(id(own))
    yield name, own
    for key, child in own._modules.items():
        if child is not None:
            yield from _walk(f"{name}.{key}" if name else key, child, seen)


def _inner(module: nn.Module) -> str:
    """The name by which a wrapper holds what it wraps; empty for a module of the model's own."""
    if isinstance(module, TokenRows):
        return "token_adapter"
    if isinstance(module, SavedModule):
        return "original_module"
    return "base_layer" if isinstance(module, (AdaptedLayer, TiedHead)) else ""
