"""The status of the adapters of a model in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peftarray.adapter_sets import AdapterSet
from peftarray.arrays import Array, device
from peftarray.registry import Registry
from peftarray.status import LayerStatus, Status, layer_status

__all__ = ["status_of"]


def status_of(registry: Registry, arrays: Mapping[str, Array], *, merged: Collection[str], norms: bool) -> Status:
    """What adapters there are, layer by layer; of one that memory does not hold, one item.

    Args:
        registry: the adapters.
        arrays: the base's.
        merged: names of those that are merged now.
        norms: whether to compute the norm of each update.
    """
    items: list[LayerStatus] = []
    for name, entry in registry.entries.items():
        found, active, is_merged = entry.found, name in registry.acting, name in merged
        if found is None:
            kind = entry.settings.peft_type
            items.append(LayerStatus(name, "", kind, scale=entry.scale, active=active, trainable=entry.trainable))
        elif isinstance(found, AdapterSet):
            for module, adapter in found.adapters.items():
                items.append(
                    layer_status(
                        adapter,
                        name=name,
                        layer=module,
                        weight=arrays[found.sites[module].tensor] if norms else None,
                        scale=entry.scale,
                        active=active,
                        merged=is_merged,
                        trainable=found.trainable,
                    )
                )
        else:
            rows = found.config.params()
            items += [
                LayerStatus(
                    adapter=name,
                    layer=key,
                    method=found.config.peft_type,
                    active=active,
                    trainable=found.trainable,
                    device=str(device(array)),
                    dtype=str(array.dtype).rpartition(".")[2],
                    parameters=array.size if found.trainable and not rows[key].frozen else 0,
                )
                for key, array in found.values.items()
            ]
    return Status(tuple(items))
