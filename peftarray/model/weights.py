"""The weights of a whole model under adapters, in the form that the model has them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftarray import trees
from peftarray.adapted_weight import adapted
from peftarray.adapter import Adapter
from peftarray.arrays import Array, namespace
from peftarray.composition import Composition
from peftarray.draws import dropout
from peftarray.errors import ConfigError, NumberError
from peftarray.method_dropout import Drop
from peftarray.model.acting import Acting, Make, changed_arrays
from peftarray.model.adapter_sets import PromptSet
from peftarray.model.bases import untied_heads, weights_of
from peftarray.model.kept_stacks import KeptStacks
from peftarray.model.mixed_batches import mixed_arrays, mixed_prompts
from peftarray.quantised_weight import QuantisedWeight
from peftarray.stand_in import formed

__all__ = [
    "check_finite",
    "effective",
    "in_precision",
    "merged_arrays",
    "mixed",
    "stand_ins",
    "under",
    "with_dropout",
    "with_weights",
]


def stand_ins(adapter: Adapter | Composition, base: Array, names: Sequence[str]) -> Array:
    """What stands for a weight; dropout is off."""
    return adapted(adapter, base)


def merged_arrays(adapter: Adapter | Composition, base: Array, names: Sequence[str]) -> Array:
    """The merged weight."""
    return adapter.merge(base)


def with_dropout(key: Any, *, by_name: bool) -> Make:
    """What stands for weights in training, with dropout drawn by a step's key.

    Args:
        key: of the step.
        by_name: whether each adapter draws by its name as well.
    """

    def make(adapter: Adapter | Composition, base: Array, names: Sequence[str]) -> Array:
        layer = adapter.layer.name
        draws = tuple(_draw(key, f"{name}/{layer}" if by_name else layer) for name in names)
        return adapted(adapter, base, drop=draws if isinstance(adapter, Composition) else draws[0])

    return make


def under(base: Any, acting: Sequence[Acting], make: Make, *, task_ids: Any = None, key: Any = None) -> Any:
    """The weights under adapters that act together.

    Args:
        base: the model.
        acting: the adapters.
        make: what takes the place of a weight.
        task_ids: the task of each text, for a prompt that has several.
        key: of the step, where dropout is on.
    """
    tree = weights_of(base)
    arrays = dict(trees.named(tree))
    changed = changed_arrays(arrays, acting, make)
    read: dict[str, Array] = {}
    for one in acting:
        if isinstance(one.found, PromptSet):
            found = one.found
            drop = None if key is None else _counted(key, "prompt")
            read |= found.config.weights(found.values, task_ids=task_ids, drop=drop)
    return _filled(tree, arrays, changed, read)


def mixed(
    base: Any,
    acting: Mapping[str, Acting],
    names: Sequence[str | None],
    make: Make,
    *,
    task_ids: Any = None,
    key: Any = None,
    kept: KeptStacks | None = None,
) -> Any:
    """The weights of a batch whose samples have adapters of their own.

    Args:
        base: the model.
        acting: name -> the adapter.
        names: the adapter of each sample, None for none.
        make, task_ids, key: as for `under`.
        kept: stacks of adapters, to be used where they can be and nothing is dropped.
    """
    order = {name: place for place, name in enumerate(acting)}
    places = [-1 if name is None else order[name] for name in names]
    tree = weights_of(base)
    arrays = dict(trees.named(tree))
    several = list(acting.values())
    stacked = None if kept is None else kept.mixed(arrays, several, places)
    changed = mixed_arrays(arrays, several, places, make) if stacked is None else stacked

    def drop(name: str) -> Drop | None:
        return None if key is None else _counted(key, f"{name}/prompt")

    read = mixed_prompts(several, places, task_ids=task_ids, drop=drop)
    return _filled(tree, arrays, changed, read)


def effective(base: Any, acting: Sequence[Acting], *, task_ids: Any = None) -> Any:
    """The weights under adapters, every one an array; heads that part from an embedding by them have their own."""
    merged = under(base, acting, merged_arrays, task_ids=task_ids)
    merged = trees.refill(merged, map(formed, trees.leaves(merged)))
    heads = untied_heads(base, under(base, acting, stand_ins, task_ids=task_ids))
    return {**merged, **heads} if heads else merged


def check_finite(tree: Any) -> None:
    """Refuse merged weights that are not finite.

    Raises:
        NumberError: one is NaN or infinite.
    """
    for name, array in trees.named(tree):
        xp = namespace(array)
        if xp.isdtype(array.dtype, "real floating") and not bool(xp.all(xp.isfinite(array))):
            message = f"{name} would hold NaN or infinity after merging; the adapter is broken, or its scale is"
            raise NumberError(message)


def in_precision(base: Any, dtype: str) -> Any:
    """The same model with its floating-point arrays in another dtype."""

    def cast(array: Array) -> Array:
        xp = namespace(array)
        if isinstance(array, QuantisedWeight):
            return array.counted_as(getattr(xp, dtype))
        return xp.astype(array, getattr(xp, dtype)) if xp.isdtype(array.dtype, "real floating") else array

    tree = weights_of(base)
    weights = trees.refill(tree, [cast(array) for array in trees.leaves(tree)])
    return with_weights(base, weights)


def with_weights(base: Any, weights: Any) -> Any:
    """The model with other weights, in its own form."""
    return weights if base is weights_of(base) else replace(base, weights=weights)


def _filled(tree: Any, arrays: Mapping[str, Array], changed: Mapping[str, Array], read: Mapping[str, Array]) -> Any:
    filled = trees.refill(tree, [changed.get(name, array) for name, array in arrays.items()])
    if not read:
        return filled
    if not isinstance(filled, dict):
        message = "a prompt is read by a model with named weights, and these are a list; load one of peftarray.models"
        raise ConfigError(message)
    return {**filled, **read}


def _counted(key: Any, stream: str) -> Drop:
    """A draw of its own each time that it is asked, for what is asked once a step."""
    places = itertools.count()

    def drop(x: Array, share: float) -> Array:
        return dropout(x, share, key, stream=f"{stream}/{next(places)}")

    return drop


def _draw(key: Any, stream: str) -> Drop:
    def drop(x: Array, share: float) -> Array:
        return dropout(x, share, key, stream=stream)

    return drop
