"""A model's low-rank adapters in slots, for functions that are compiled once: which adapter acts is an array.

`slots.arrays` and an index are what a compiled function is given; to choose another adapter, or to put one into a place
that another had, changes their numbers and none of their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from peftarray import trees
from peftarray.adapter import beside_short
from peftarray.adapter_sets import AdapterSet, Loaded
from peftarray.arrays import Array, integers
from peftarray.bases import weights_of
from peftarray.errors import ConfigError, MatchError, UnsupportedError, nearest
from peftarray.layers import Layer, contract
from peftarray.method import AdapterConfig
from peftarray.slots import Factors, put_slot, slot_factors, slot_update, stack_slots
from peftarray.stand_in import OverArray, kind_for

__all__ = ["AdapterSlots", "SlottedWeight", "slots_of"]


class SlottedWeight(OverArray):
    """A weight with the slots that an index chooses, for all samples of a batch or one for each.

    Attributes:
        base: the frozen weight.
        down, up: the stacks; see `peftarray.slots`.
        index: `(1,)` or `(n,)`.
        layer: the layer.
    """

    def __init__(self, base: Array, down: Array, up: Array, index: Array, layer: Layer, flipped: bool = False) -> None:
        self.base = base
        self.down = down
        self.up = up
        self.index = index
        self.layer = layer
        self._flipped = flipped

    @property
    def mT(self) -> Self:
        return type(self)(self.base, self.down, self.up, self.index, self.layer, not self._flipped)

    def kept(self, keep: Callable[[AdapterConfig], bool]) -> Array:
        """The frozen weight: an adapter that a tied head follows has no slot."""
        return self.base.mT if self._flipped else self.base

    def dense(self) -> Array:
        message = (
            f"{self.layer.name}: the weight is chosen by an index, and is not formed; use x @ w.T, w[ids] or their like"
        )
        raise UnsupportedError(message)

    def after(self, x: Array) -> Array:
        if self.layer.kind != "linear" or self._flipped == self.layer.transposed:
            return x @ self.dense()
        return self._forward(x)

    def rows(self, indices: Array) -> Array:
        return NotImplemented if self.layer.kind != "embedding" or self._flipped else self._forward(indices)

    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        return (self.base, self.down, self.up, self.index), (self.layer, self._flipped)

    @classmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        layer, flipped = rest
        base, down, up, index = arrays
        return cls(base, down, up, index, layer, flipped)

    def _forward(self, x: Array) -> Array:
        def apply(given: Array, wide: Array) -> Array:
            y = contract(given, self.layer.view(wide), self.layer)
            return y + slot_update(given, self.down, self.up, self.index, self.layer)

        return beside_short(apply, x, self.base, self.layer)


@dataclass(frozen=True, eq=False)
class AdapterSlots:
    """Adapters of a model in slots. A value.

    Attributes:
        base: the model.
        layers: tensor's name -> what is known of its layer, of those that have slots.
        arrays: `<tensor>.down` and `<tensor>.up` -> the stacks.
        names: the adapter in each slot from 1 on; None where one is free.
        rank: of all slots.
    """

    base: Any
    layers: Mapping[str, Layer]
    arrays: Mapping[str, Array]
    names: tuple[str | None, ...]
    rank: int

    def index(self, names: Sequence[str | None] | str | None) -> Array:
        """The index that chooses adapters: of one for all samples, or of one for each; None is no adapter.

        Raises:
            MatchError: a name has no slot.
        """
        several = [names] if names is None or isinstance(names, str) else list(names)
        found = [0 if name is None or name == "__base__" else self.place(name) for name in several]
        return integers(found, next(iter(self.arrays.values())))

    def place(self, name: str) -> int:
        """The slot of an adapter.

        Raises:
            MatchError: it has none.
        """
        if name not in self.names:
            known = [other for other in self.names if other is not None]
            message = f"{name!r} has no slot{nearest(name, known)}; the slots hold {', '.join(known) or 'nothing'}"
            raise MatchError(message)
        return self.names.index(name) + 1

    def weights(self, index: Array, arrays: Mapping[str, Array] | None = None) -> Any:
        """The model's weights with the chosen slots.

        Args:
            index: from `index`.
            arrays: in place of this object's own, as a compiled function is given them.
        """
        stacks = self.arrays if arrays is None else arrays
        tree = weights_of(self.base)
        filled = []
        for name, array in trees.named(tree):
            layer = self.layers.get(name)
            if layer is not None:
                down, up = stacks[f"{name}.down"], stacks[f"{name}.up"]
                array = kind_for(SlottedWeight, array, down, up)(array, down, up, index, layer)
            filled.append(array)
        return trees.refill(tree, filled)

    def put(self, name: str, found: Loaded, *, place: int | None = None, scale: float = 1.0) -> AdapterSlots:
        """With an adapter in a slot: the one of its name, or a free one, or the one that is given.

        Raises:
            ConfigError: no slot is free, or the adapter's rank is beyond the slots'.
            MatchError: it adapts a weight that has no slots.
            UnsupportedError: it cannot be put into slots.
        """
        if place is None and name in self.names:
            place = self.place(name)
        if place is None and None not in self.names:
            message = f"all {len(self.names)} slots are taken; give the place of the one to replace, or more slots"
            raise ConfigError(message)
        place = self.names.index(None) + 1 if place is None else place
        factors = _factors(name, found, self.rank, scale)
        for tensor in factors:
            if tensor not in self.layers:
                message = f"{name} adapts {tensor}, which has no slots{nearest(tensor, self.layers)}"
                raise MatchError(message)
        arrays = {}
        for tensor in self.layers:
            stacks = self.arrays[f"{tensor}.down"], self.arrays[f"{tensor}.up"]
            arrays[f"{tensor}.down"], arrays[f"{tensor}.up"] = put_slot(stacks, place, factors.get(tensor))
        names = tuple(name if i + 1 == place else None if old == name else old for i, old in enumerate(self.names))
        return replace(self, arrays=arrays, names=names)


def slots_of(
    base: Any, sets: Mapping[str, Loaded], *, max_rank: int, count: int | None, scales: Mapping[str, float]
) -> AdapterSlots:
    """Adapters of a model in slots.

    Args:
        base: the model.
        sets: name -> adapter, at least one.
        max_rank: the rank of all slots.
        count: how many slots; as many as adapters if None.
        scales: name -> what the adapter's update is multiplied by.

    Raises:
        ConfigError: there are fewer slots than adapters, or none; a rank is beyond `max_rank`.
        UnsupportedError: an adapter cannot be put into slots.
    """
    free = (len(sets) if count is None else count) - len(sets)
    if not sets or free < 0:
        message = f"{len(sets)} adapters are to have {count} slots; give at least one adapter, and a slot for each"
        raise ConfigError(message)
    every = {name: _factors(name, found, max_rank, scales[name]) for name, found in sets.items()}
    layers: dict[str, Layer] = {}
    for found in sets.values():
        assert isinstance(found, AdapterSet)
        for module, site in found.sites.items():
            layers.setdefault(site.tensor, found.adapters[module].layer)
    arrays: dict[str, Array] = {}
    for tensor in layers:
        own = [factors.get(tensor) for factors in every.values()]
        arrays[f"{tensor}.down"], arrays[f"{tensor}.up"] = stack_slots([*own, *[None] * free])
    return AdapterSlots(base, layers, arrays, (*sets, *[None] * free), max_rank)


def _factors(name: str, found: Loaded, rank: int, scale: float) -> dict[str, Factors]:
    if not isinstance(found, AdapterSet) or found.whole:
        what = "replaces arrays whole" if isinstance(found, AdapterSet) else "is a prompt"
        message = f"{name} {what}, and slots hold low-rank updates alone; name the adapter of each row (adapter_names)"
        raise UnsupportedError(message)
    made: dict[str, Factors] = {}
    for module, site in found.sites.items():
        if site.tensor in made:
            message = f"{name} has two adapters on {site.tensor}, and a slot holds one"
            raise UnsupportedError(message)
        made[site.tensor] = slot_factors(found.adapters[module], rank, scale=scale)
    return made
