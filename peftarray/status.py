"""What adapters a model has, layer by layer: as data, and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peftarray.adapter import Adapter
from peftarray.arrays import Array, device, namespace, to_host
from peftarray.slots import thin_factors, why_not_thin

__all__ = ["LayerStatus", "Status", "layer_status"]


@dataclass(frozen=True)
class LayerStatus:
    """One adapter on one layer.

    Attributes:
        adapter: its name.
        layer: the module's name; of a prompt, the name of its array.
        method: PEFT's name of the method.
        rank: of its factors; None where the method has none.
        scale: what its update is multiplied by: the method's own scale times the adapter's.
        active: whether it acts.
        merged: whether it is in the model's weights now.
        trainable: whether training changes it.
        device: where its arrays lie; empty where memory does not hold them.
        dtype: of its arrays; likewise.
        norm: of the update of the weight (Frobenius), with its scale; None where it was not asked for.
        parameters: how many numbers it trains.
    """

    adapter: str
    layer: str
    method: str
    rank: int | None = None
    scale: float = 1.0
    active: bool = False
    merged: bool = False
    trainable: bool = False
    device: str = ""
    dtype: str = ""
    norm: float | None = None
    parameters: int = 0


@dataclass(frozen=True)
class Status:
    """The adapters of a model, one item for each on each layer. `str()` gives a table.

    Attributes:
        layers: the items.

    Example:
        >>> print(Status((LayerStatus("a", "up", "LORA", rank=8, scale=2.0, active=True, norm=0.5),)))
        adapter  layer  method  rank  scale  active  merged  device  dtype  norm
        a        up     LORA       8      2  yes     no                      0.5
    """

    layers: tuple[LayerStatus, ...]

    def __iter__(self) -> Iterator[LayerStatus]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_list(self) -> list[dict[str, Any]]:
        """The items as JSON has them."""
        return [dataclasses.asdict(item) for item in self.layers]

    def __str__(self) -> str:
        rows = [_COLUMNS, *(_cells(item) for item in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
                for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


_COLUMNS = ("adapter", "layer", "method", "rank", "scale", "active", "merged", "device", "dtype", "norm")
_NUMBERS = frozenset({"rank", "scale", "norm"})


def layer_status(
    adapter: Adapter,
    *,
    name: str,
    layer: str = "",
    weight: Array | None = None,
    scale: float = 1.0,
    active: bool = False,
    merged: bool = False,
    trainable: bool = True,
) -> LayerStatus:
    """What is to be said of an adapter on a layer.

    Args:
        adapter: the adapter.
        name: its name in the model.
        layer: the module's name; the one that the adapter knows if empty.
        weight: the frozen weight, where the norm of the update is wanted.
        scale: what its update is multiplied by, besides the method's own scale.
        active, merged, trainable: as in `LayerStatus`.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoraConfig
        >>> weight = np.ones((4, 3), np.float32)
        >>> found = layer_status(LoraConfig(r=2).init(weight, name="up"), name="a", weight=weight)
        >>> found.rank, found.scale, found.norm, found.dtype, found.parameters
        (2, 4.0, 0.0, 'float32', 14)
    """
    arrays = list(adapter.params.values())
    return LayerStatus(
        adapter=name,
        layer=layer or adapter.layer.name,
        method=adapter.config.peft_type,
        rank=_rank(adapter),
        scale=adapter.config.scale * scale,
        active=active,
        merged=merged,
        trainable=trainable,
        device=_joined(str(device(array)) for array in arrays),
        dtype=_joined(str(array.dtype).rpartition(".")[2] for array in arrays),
        norm=None if weight is None else abs(scale) * _norm(adapter, weight),
        parameters=adapter.config.num_parameters(adapter.layer) if trainable else 0,
    )


def _rank(adapter: Adapter) -> int | None:
    """The length of the axis that the method's table calls `r`."""
    for name, row in adapter.config.params(adapter.layer).items():
        if name in adapter.params:
            for word, size in zip(row.axes.split(), adapter.params[name].shape, strict=False):
                if word == "r":
                    return int(size)
    return None


def _norm(adapter: Adapter, weight: Array) -> float:
    """The norm of an update; of two thin factors, from products as small as the rank."""
    if "weight" not in adapter.touches():
        return 0.0
    if why_not_thin(adapter) is None:
        down, up = thin_factors(adapter)
        square = namespace(down, up).sum((up.mT @ up) * (down @ down.mT))
        return math.sqrt(max(0.0, float(to_host(square))))
    change = adapter.change(weight)
    return math.sqrt(float(to_host(namespace(change).sum(change * change))))


def _joined(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _cells(item: LayerStatus) -> tuple[str, ...]:
    return (
        item.adapter,
        item.layer,
        item.method,
        "" if item.rank is None else str(item.rank),
        f"{item.scale:g}",
        "yes" if item.active else "no",
        "yes" if item.merged else "no",
        item.device,
        item.dtype,
        "" if item.norm is None else f"{item.norm:.4g}",
    )
