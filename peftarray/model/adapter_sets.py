"""One adapter of a model, with all that it has: a method on some of its layers, or a soft prompt. Values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peftarray.adapter import Adapter
from peftarray.arrays import Array, Params, unsealed
from peftarray.method import AdapterConfig
from peftarray.model.sites import Site
from peftarray.prompts import Prompt

__all__ = ["AdapterSet", "Loaded", "PromptSet"]


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """One adapter of a model: its configuration, and what it has for each module.

    Attributes:
        config: with targets and patterns.
        adapters: module's name -> its adapter.
        sites: module's name -> its weight.
        whole: tensor's name -> the array that takes its place (`modules_to_save`, trained biases).
        trainable: whether training changes it.
        extra: fields of its `adapter_config.json` that are not known here, which are written back.
    """

    config: AdapterConfig
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    whole: Mapping[str, Array] = field(default_factory=dict)
    trainable: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def trained(self) -> dict[str, Array]:
        """Name -> array of what training changes, without `whole`: `<module>.<array>`, or the name that layers share
        it under.
        """
        found: dict[str, Array] = {}
        for name, module, key in self._places():
            found.setdefault(name, self.adapters[module].params[key])
        return found

    def with_trained(self, params: Params) -> AdapterSet:
        """The same with these arrays in place of those of the same names."""
        new = {module: dict(adapter.params) for module, adapter in self.adapters.items()}
        for name, module, key in self._places():
            if name in params:
                new[module][key] = params[name]
        adapters = {module: replace(adapter, params=new[module]) for module, adapter in self.adapters.items()}
        return replace(self, adapters=adapters)

    def arrays(self) -> Iterator[Array]:
        """Every array, once."""
        every = [array for adapter in self.adapters.values() for array in adapter.params.values()]
        yield from {id(array): array for array in [*every, *self.whole.values()]}.values()

    def moved(self, move: Callable[[Array], Array]) -> AdapterSet:
        """The same with every array put through a function, what layers share once."""
        once = _once(move)
        adapters = {
            module: replace(adapter, params={key: once(array) for key, array in adapter.params.items()})
            for module, adapter in self.adapters.items()
        }
        return replace(self, adapters=adapters, whole={name: once(array) for name, array in self.whole.items()})

    def unfrozen(self) -> AdapterSet:
        """The same, which training changes, in place too."""
        return replace(self.moved(unsealed), trainable=True)

    def restorable(self) -> bool:
        """Whether a file holds all that it is."""
        return True

    def _places(self) -> Iterator[tuple[str, str, str]]:
        """(name in `trained`, module, name in the adapter)."""
        for module, adapter in self.adapters.items():
            for key, row in adapter.config.params(adapter.layer).items():
                if not row.frozen:
                    yield row.shared or f"{module}.{key}", module, key


@dataclass(frozen=True, eq=False)
class PromptSet:
    """A soft prompt of a model: its configuration, and its arrays.

    Attributes:
        config: with the model's sizes.
        arrays: trained ones, or those of a file.
        whole, trainable, extra: as in `AdapterSet`.
    """

    config: Prompt
    values: Mapping[str, Array]
    whole: Mapping[str, Array] = field(default_factory=dict)
    trainable: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def trained(self) -> dict[str, Array]:
        """Name -> array of what training changes, without `whole`."""
        return {name: self.values[name] for name, row in self.config.params().items() if not row.frozen}

    def with_trained(self, params: Params) -> PromptSet:
        """The same with these arrays in place of those of the same names."""
        arrays = {name: params.get(name, array) for name, array in self.values.items()}
        return replace(self, values=arrays)

    def arrays(self) -> Iterator[Array]:
        """Every array."""
        yield from self.values.values()
        yield from self.whole.values()

    def moved(self, move: Callable[[Array], Array]) -> PromptSet:
        """The same with every array put through a function."""
        arrays = {name: move(array) for name, array in self.values.items()}
        return replace(self, values=arrays, whole={name: move(array) for name, array in self.whole.items()})

    def unfrozen(self) -> PromptSet:
        """The same, which training changes.

        Raises:
            UnsupportedError: the file that it came from lacks what made the prompt.
        """
        self.config.check_trainable(self.values)
        return replace(self, trainable=True)

    def restorable(self) -> bool:
        """Whether a file holds all that it is: not where it leaves an encoder behind."""
        return self.values.keys() == self.config.stored().keys()


Loaded = AdapterSet | PromptSet


def _once(move: Callable[[Array], Array]) -> Callable[[Array], Array]:
    known: dict[int, tuple[Array, Array]] = {}

    def moved(array: Array) -> Array:
        if id(array) not in known:
            known[id(array)] = array, move(array)
        return known[id(array)][1]

    return moved
