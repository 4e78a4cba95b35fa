"""The weights of a model under the adapters that act on it: the base's arrays, some of them in another's place.

One adapter of scale 1 changes an array as it does alone. Several are composed by the rule of `peftarray.composition`,
each update taken of the base; what one of them trains whole is an update likewise, `s (R - W)`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from peftarray.adapter import Adapter
from peftarray.adapter_sets import AdapterSet, Loaded, PromptSet
from peftarray.arrays import Array, namespace
from peftarray.composition import Composition, composed
from peftarray.errors import UnsupportedError

__all__ = ["Acting", "Make", "changed_arrays", "check_together"]

Make = Callable[[Adapter | Composition, Array, Sequence[str]], Array]
"""What takes the place of a weight: of its adapters, the weight, and the names of the adapters."""


class Acting(NamedTuple):
    """An adapter that acts.

    Attributes:
        name: of the adapter.
        found: the adapter.
        scale: what its update is multiplied by.
    """

    name: str
    found: Loaded
    scale: float = 1.0


def changed_arrays(arrays: Mapping[str, Array], acting: Sequence[Acting], make: Make) -> dict[str, Array]:
    """Name -> what takes the place of an array of the base, for those that adapters change.

    Args:
        arrays: the base's.
        acting: the adapters.
        make: of a weight that is adapted.

    Raises:
        UnsupportedError: they cannot act together.
    """
    methods = [one for one in acting if isinstance(one.found, AdapterSet)]
    changed: dict[str, Array] = {}
    for one in acting:
        if isinstance(one.found, PromptSet):
            changed |= one.found.whole
    if len(methods) == 1 and methods[0].scale == 1:
        return changed | _alone(arrays, methods[0], make)
    return changed | _composed(arrays, methods, make) if methods else changed


def check_together(sets: Mapping[str, Loaded]) -> None:
    """Refuse adapters that cannot act together.

    Raises:
        UnsupportedError: two are prompts; two replace one tensor with different arrays; one replaces what a method of
            another needs to read; one has two adapters on one tensor.
    """
    prompts = [name for name, found in sets.items() if isinstance(found, PromptSet)]
    if len(prompts) > 1:
        message = f"{prompts[0]} and {prompts[1]} are both prompts, and a model reads one; make one of them active"
        raise UnsupportedError(message)
    owners: dict[str, str] = {}
    for name, found in sets.items():
        for tensor, array in found.whole.items():
            other = owners.setdefault(tensor, name)
            if sets[other].whole[tensor] is not array:
                message = (
                    f"{other} and {name} both replace {tensor} whole (modules_to_save, or trained biases); make one of "
                    "them active"
                )
                raise UnsupportedError(message)
    for name, found in sets.items():
        if isinstance(found, AdapterSet):
            for tensor, (_, adapter) in _by_tensor(name, found).items():
                _check_base(tensor, name, adapter, owners)


def _check_base(tensor: str, name: str, adapter: Adapter, owners: Mapping[str, str]) -> None:
    if tensor in owners and not adapter.adds_apart():
        message = (
            f"{name} adapts {tensor} by {type(adapter.config).__name__}, which reads the base's weight, and "
            f"{owners[tensor]} replaces it whole; make one of them active"
        )
        raise UnsupportedError(message)


def _by_tensor(name: str, found: AdapterSet) -> dict[str, tuple[str, Adapter]]:
    """Tensor -> module and adapter of an adapter that is to be composed with others."""
    placed: dict[str, tuple[str, Adapter]] = {}
    for module, site in found.sites.items():
        if site.tensor in placed:
            message = (
                f"{name} has two adapters on {site.tensor}, one upon the other, and so acts alone with scale 1; "
                "make no other active beside it"
            )
            raise UnsupportedError(message)
        placed[site.tensor] = module, found.adapters[module]
    return placed


def _alone(arrays: Mapping[str, Array], one: Acting, make: Make) -> dict[str, Array]:
    found = one.found
    assert isinstance(found, AdapterSet)
    changed = dict(found.whole)
    for module, site in found.sites.items():
        adapter = found.adapters[module]
        touched, base = adapter.touches(), changed.get(site.tensor, arrays[site.tensor])
        if site.bias is not None and "bias" in touched:
            bias = changed.get(site.bias, arrays[site.bias])
            changed[site.bias] = _cast(adapter.merge_bias(bias, base), bias)
        if "weight" in touched:
            changed[site.tensor] = make(adapter, base, (one.name,))
    return changed


def _composed(arrays: Mapping[str, Array], acting: Sequence[Acting], make: Make) -> dict[str, Array]:
    check_together({one.name: one.found for one in acting})
    changed: dict[str, Array] = {}
    owners: dict[str, str] = {}
    for one in acting:
        for name, array in one.found.whole.items():
            if name not in owners:
                changed[name] = _scaled_whole(name, arrays[name], array, one)
                owners[name] = one.name
    weights: dict[str, list[tuple[Adapter, Acting]]] = defaultdict(list)
    biases: dict[str, list[tuple[Adapter, Acting, str]]] = defaultdict(list)
    for one in acting:
        found = one.found
        assert isinstance(found, AdapterSet)
        for tensor, (module, adapter) in _by_tensor(one.name, found).items():
            bias, touched = found.sites[module].bias, adapter.touches()
            if "weight" in touched:
                weights[tensor].append((adapter, one))
            if bias is not None and "bias" in touched:
                biases[bias].append((adapter, one, tensor))
    for tensor, parts in weights.items():
        together = composed([adapter for adapter, _ in parts], [one.scale for _, one in parts])
        changed[tensor] = make(together, changed.get(tensor, arrays[tensor]), [one.name for _, one in parts])
    for bias, changes in biases.items():
        base = arrays[bias]
        total = changed.get(bias, base)
        for adapter, one, tensor in changes:
            own = one.found.whole.get(bias, base)
            total = total + (adapter.merge_bias(own, arrays[tensor]) - own) * one.scale
        changed[bias] = _cast(total, base)
    return changed


def _scaled_whole(name: str, base: Array, array: Array, one: Acting) -> Array:
    if one.scale == 1:
        return array
    if tuple(array.shape) != tuple(base.shape) or not namespace(base).isdtype(base.dtype, "real floating"):
        message = f"{one.name} replaces {name} whole, with another shape, so it cannot be scaled; give it the scale 1"
        raise UnsupportedError(message)
    return _cast(base + (array - base) * one.scale, base)


def _cast(array: Array, like: Any) -> Array:
    return array if array.dtype == like.dtype else namespace(array).astype(array, like.dtype)
