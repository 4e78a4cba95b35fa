"""What stands between a reader and the merger: which base tensors an adapter changes, by which method, from which
arrays.

Everything about names ends in a reader; everything about bytes starts in the merger; a method sees neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peftarray.dtypes import decode
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["Adapters", "Piece", "Ref", "Site", "matrix_rows", "same_values"]


@dataclass(frozen=True)
class Ref:
    """A tensor of the adapter's file, or a part of it.

    Attributes:
        name: the tensor.
        rows: (first, last + 1) of its first axis; None for all.
        columns: (first, step) of its second axis; None for all. An expert's columns lie a step apart.
    """

    name: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def shape(self, tensors: Checkpoint) -> tuple[int, ...]:
        """The shape of what it refers to, from the header."""
        shape = list(tensors[self.name].shape)
        if self.rows is not None:
            shape[0] = self.rows[1] - self.rows[0]
        if self.columns is not None:
            shape[1] = len(range(self.columns[0], shape[1], self.columns[1]))
        return tuple(shape)

    def read(self, tensors: Checkpoint, dtype: np.dtype) -> np.ndarray:
        """Its values in `dtype`, contiguous."""
        info = tensors[self.name]
        stored = tensors.read_stored(self.name, None if self.rows is None else slice(*self.rows))
        if self.columns is not None:
            stored = stored[:, self.columns[0] :: self.columns[1]]
        return np.ascontiguousarray(decode(stored, info.dtype)).astype(dtype, copy=False).reshape(stored.shape)


@dataclass(frozen=True)
class Piece:
    """A range of rows of a layer's stored matrix, and where it lies.

    A tensor of the base is seen as a matrix whose columns are the layer's: a stack of experts is as many blocks of
    rows.

    Attributes:
        tensor: the base tensor, by its name on disk.
        start: first row of the layer's stored matrix.
        rows: how many.
        at: the row of the tensor where they begin.
    """

    tensor: str
    start: int
    rows: int
    at: int = 0


@dataclass(frozen=True)
class Site:
    """One adapted weight.

    Attributes:
        layer: what the method knows of it.
        method: with patterns resolved.
        params: the method's names -> where the arrays are.
        pieces: where the weight lies.
        bias: the base tensor of the layer's bias, None where it has none.
    """

    layer: Layer
    method: AdapterConfig
    params: Mapping[str, Ref]
    pieces: tuple[Piece, ...]
    bias: str | None = None

    @property
    def stored_matrix(self) -> tuple[int, int]:
        """Rows and columns of the layer's weight as it is stored."""
        layer = self.layer
        return (layer.fan_in, layer.out) if layer.transposed else (layer.out, layer.fan_in)

    @property
    def row_axis(self) -> str:
        """The method's axis that the stored rows run along."""
        return "in" if self.layer.transposed else "out"


@dataclass(frozen=True)
class Adapters:
    """One adapter checkpoint against one base.

    Attributes:
        name: where it was read, for messages.
        tensors: the adapter's file.
        config: its configuration.
        sites: the adapted weights; where two have the same tensor, the first is applied first.
        replace: base tensors, or new ones, that take the adapter's values whole.
        untied: new tensor -> the base tensor that it starts as: a head that no longer equals the embedding.
        config_changes: what the merged model's `config.json` must say.
        unused: tensors that play no part in the merged weights (training state, copies of tied factors).
        unmatched: tensors and targets without a counterpart, which the caller chose to allow.
        notes: facts that the report should tell.
        shared: what layers share, by its name and dtype, once it was read or derived for the first of them.
    """

    name: str
    tensors: Checkpoint
    config: AdapterConfig
    sites: tuple[Site, ...]
    replace: Mapping[str, Ref] = field(default_factory=dict)
    untied: Mapping[str, str] = field(default_factory=dict)
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shared: dict[tuple[str, np.dtype], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def params(self, site: Site, dtype: np.dtype, weight: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a site: those of the file, and those that its method derives.

        Args:
            site: one of this adapter's.
            dtype: what to compute in.
            weight: gives the base weight as the method sees it; asked only if the method reads it.
        """
        table = site.method.params(site.layer)
        keys = {name: (row.shared, dtype) for name, row in table.items() if row.shared is not None}
        found = {name: self.shared[key] for name, key in keys.items() if key in self.shared}
        found |= {name: ref.read(self.tensors, dtype) for name, ref in site.params.items() if name not in found}
        if len(found) < len(table):
            reads = site.method.reads_base(site.layer)
            base = weight() if reads else np.empty((0, site.layer.fan_in), dtype)
            made = site.method.derive(site.layer, found, base)
            found |= {name: array.astype(dtype, copy=False) for name, array in made.items()}
        # Several threads may make the same; whichever they keep is right.
        self.shared.update({key: found[name] for name, key in keys.items()})
        return found


def matrix_rows(shape: tuple[int, ...], columns: int) -> int:
    """How many rows a tensor has when it is seen as a matrix with `columns` columns."""
    return math.prod(shape) // columns if columns else 0


def same_values(a: Ref | None, b: Ref | None, tensors: Checkpoint) -> bool:
    """Whether two whole tensors of an adapter have equal bytes, compared a few rows at a time."""
    if a is None or b is None:
        return False
    first, second = tensors[a.name], tensors[b.name]
    if (first.shape, first.code) != (second.shape, second.code):
        return False
    rows = first.shape[0] if first.shape else 1
    step = max(1, (4 << 20) * rows // max(1, first.nbytes))
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)] if first.shape else [None]
    return all(
        tensors.read_stored(a.name, part).tobytes() == tensors.read_stored(b.name, part).tobytes() for part in parts
    )
