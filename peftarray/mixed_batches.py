"""The weights of a batch whose samples have adapters of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peftarray.acting import Acting, Make, changed_arrays
from peftarray.adapter_sets import PromptSet
from peftarray.arrays import Array, device, integers, namespace
from peftarray.errors import UnsupportedError
from peftarray.method_dropout import Drop
from peftarray.mixed import mixed_bias, mixed_weight
from peftarray.prompts.prompt import COUNTS, KEY_VALUES, TOKENS

__all__ = ["mixed_arrays", "mixed_prompts"]


def mixed_arrays(
    arrays: Mapping[str, Array], acting: Sequence[Acting], places: Sequence[int], make: Make
) -> dict[str, Array]:
    """Name -> what takes the place of an array of the base, another for each sample.

    Args:
        arrays: the base's.
        acting: the adapters of the batch.
        places: for each sample its adapter among these, -1 for none.
        make: of a weight that is adapted.
    """
    every = [changed_arrays(arrays, [one], make) for one in acting]
    changed: dict[str, Array] = {}
    slots = [place + 1 for place in places]
    for name in dict.fromkeys(name for own in every for name in own):
        base = arrays[name]
        parts = [base, *(own.get(name, base) for own in every)]
        used = {id(parts[slot]): parts[slot] for slot in slots}
        if any(tuple(part.shape) != tuple(base.shape) for part in used.values()):
            message = f"{name} has another shape in one adapter of the batch; run its samples apart"
            raise UnsupportedError(message)
        if len(used) == 1:
            changed[name] = next(iter(used.values()))
        elif base.ndim == 1 and name.rpartition(".")[2] == "bias":
            changed[name] = mixed_bias(parts, slots)
        elif base.ndim > 1:
            changed[name] = mixed_weight(parts, slots)
        else:
            message = (
                f"{name} is trained whole by an adapter of the batch, and is neither a matrix nor a bias; run the "
                "samples of that adapter apart"
            )
            raise UnsupportedError(message)
    return changed


def mixed_prompts(
    acting: Sequence[Acting],
    places: Sequence[int],
    *,
    task_ids: Sequence[int] | None = None,
    drop: Callable[[str], Drop | None],
) -> dict[str, Array]:
    """What a model reads of the prompts of a batch: each sample's own, behind others' length of padding.

    Args:
        acting: the adapters of the batch, of which some are prompts.
        places: for each sample its adapter among these, -1 for none.
        task_ids: the task of each sample, where a prompt has several.
        drop: the name of a prompt -> what its dropout draws by.

    Returns:
        `prompt.tokens` `(n, virtual tokens, width)` and `prompt.key_values` `(2 * layers, n, groups, virtual tokens,
        head width)`, where there are some, and `prompt.counts` `(n, 2)`: how many of both are each sample's own, the
        last of those that it is given.
    """
    blocks: dict[str, list[Array]] = {TOKENS: [], KEY_VALUES: []}
    # For each sample, its place among the blocks of a kind; -1 for none.
    chosen = {kind: [-1] * len(places) for kind in blocks}
    for number, one in enumerate(acting):
        if not isinstance(one.found, PromptSet):
            continue
        mine = [sample for sample, place in enumerate(places) if place == number]
        for kind, array in _read(one, mine, task_ids, drop(one.name)).items():
            several = kind == TOKENS and array.ndim == 3
            for i, sample in enumerate(mine):
                chosen[kind][sample] = len(blocks[kind]) + (i if several else 0)
            blocks[kind] += [array[i, ...] for i in range(len(mine))] if several else [array]
    counts = np.zeros((len(places), 2), np.int64)
    found: dict[str, Any] = {}
    for column, (kind, arrays) in enumerate(blocks.items()):
        if not arrays:
            continue
        lengths = [array.shape[-2] for array in arrays]
        padded = [_padded(array, max(lengths)) for array in arrays]
        xp = namespace(*padded)
        stacked = xp.stack([_padded(arrays[0][..., :0, :], max(lengths)), *padded], axis=0)
        picked = xp.take(stacked, integers([place + 1 for place in chosen[kind]], stacked), axis=0)
        found[kind] = picked if kind == TOKENS else xp.permute_dims(picked, (1, 0, 2, 3, 4))
        counts[:, column] = [0 if place < 0 else lengths[place] for place in chosen[kind]]
    return found | {COUNTS: counts} if found else found


def _read(one: Acting, mine: Sequence[int], task_ids: Sequence[int] | None, drop: Drop | None) -> dict[str, Array]:
    found = one.found
    assert isinstance(found, PromptSet)
    tasks = None if task_ids is None or "prefix_task_cols" not in found.values else [task_ids[i] for i in mine]
    read = found.config.weights(found.values, task_ids=tasks, drop=drop)
    for name in read:
        if name not in (TOKENS, KEY_VALUES):
            message = (
                f"{one.name} is a {found.config.peft_type} prompt, which lies within the layers and cannot be another "
                "for each sample; run its samples apart"
            )
            raise UnsupportedError(message)
    return read


def _padded(array: Array, length: int) -> Array:
    """Virtual tokens `(..., n, width)` behind zeros, so many in all."""
    missing = length - array.shape[-2]
    if not missing:
        return array
    xp = namespace(array)
    shape = (*array.shape[:-2], missing, array.shape[-1])
    zeros = xp.zeros(shape, dtype=array.dtype, device=device(array))
    return xp.concat([zeros, array], axis=-2) if array.shape[-2] else zeros
