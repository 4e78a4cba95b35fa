"""Adapters of a torch module in slots: stacks of one shape in each layer, from which an index chooses.

A compiled module goes on as it is when another adapter acts, comes, or takes the place of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peftarray.backends.torch_drafts import Draft
from peftarray.backends.torch_layers import AdaptedLayer

from peftarray.errors import ConfigError, UnsupportedError
from peftarray.slots import Factors, slot_factors, stack_slots

__all__ = ["Slots"]


@dataclass(frozen=True, eq=False)
class Slots:
    """Which slot each adapter has.

    Attributes:
        layers: name of a module -> the layer, which has the stacks as buffers.
        rank: of every slot; adapters of a lower one are padded by zeros.
        count: how many adapters there may be; slot 0 is empty and stands for none.
        places: name of an adapter -> its slot.
    """

    layers: Mapping[str, AdaptedLayer]
    rank: int
    count: int
    places: Mapping[str, int]

    @classmethod
    def prepared(
        cls,
        drafts: Mapping[str, Draft],
        layers: Mapping[str, AdaptedLayer],
        scales: Mapping[str, float],
        *,
        rank: int,
        count: int,
    ) -> Slots:
        """Slots for these adapters, and room for more: layers get their stacks.

        Raises:
            ConfigError: the adapters do not fit in.
            UnsupportedError: one cannot be put into slots.
        """
        if type(rank) is not int or type(count) is not int or rank < 1 or count < max(1, len(drafts)):
            message = (
                f"slots are asked for with max_rank={rank!r} and count={count!r}; give a rank of at least 1, and at "
                f"least as many slots as there are adapters ({len(drafts)})"
            )
            raise ConfigError(message)
        found = cls(layers, rank, count, {name: place for place, name in enumerate(drafts, start=1)})
        factors = {name: found.factors(draft, scales.get(name, 1.0)) for name, draft in drafts.items()}
        stacks = {}
        with torch.no_grad():
            for path in layers:
                own = [factors[name].get(path) for name in drafts]
                stacks[path] = stack_slots([*own, *[None] * (count - len(own))])
        for path, pair in stacks.items():
            layers[path].take_slots(pair)
        return found

    def index(self, names: Sequence[str | None]) -> torch.Tensor:
        """The slots of these adapters, that of none where there is none."""
        places = [0 if name is None else self.places[name] for name in names] or [0]
        first = next(iter(self.layers.values()))
        return torch.tensor(places, device=first.slot_down.device)

    def factors(self, draft: Draft, scale: float) -> dict[str, Factors]:
        """Name of a module -> what an adapter puts into a slot there.

        Raises:
            UnsupportedError: it cannot be put into slots.
            ConfigError: its rank is beyond the slots'.
        """
        others = sorted({*draft.adapters} - {*self.layers})
        if others or draft.saved or draft.tensors:
            what = f"is on {others[0]}, which has none" if others else "trains tensors of the model whole"
            message = f"the model's layers have slots, and the adapter {what}; release_slots() first"
            raise UnsupportedError(message)
        with torch.no_grad():
            return {path: slot_factors(a, self.rank, scale=scale) for path, a in draft.adapters.items()}

    def with_adapter(self, name: str) -> Slots:
        """The same with a slot for another adapter.

        Raises:
            ConfigError: none is free.
        """
        free = set(range(1, self.count + 1)) - set(self.places.values())
        if not free:
            message = f"all {self.count} slots are taken; delete an adapter, hotswap one, or prepare more slots"
            raise ConfigError(message)
        return replace(self, places={**self.places, name: min(free)})

    def without(self, name: str) -> Slots:
        """The same without an adapter."""
        return replace(self, places={other: place for other, place in self.places.items() if other != name})

    def renamed(self, name: str, new: str) -> Slots:
        """The same with another name for an adapter."""
        return replace(self, places={new if other == name else other: p for other, p in self.places.items()})

    def write(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Fill an adapter's slot, in place: compiled code has the addresses."""
        place = self.places[name]
        with torch.no_grad():
            for path, layer in self.layers.items():
                for stack, new in zip((layer.slot_down, layer.slot_up), factors.get(path, (0, 0)), strict=True):
                    stack[place] = new

    def release(self) -> None:
        """Take the stacks from the layers."""
        for layer in self.layers.values():
            layer.leave_slots()
