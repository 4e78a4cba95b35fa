"""What adapters do to the tensors of a base: contributions, and the rows of a tensor that the same ones change.

With several adapters, each with a weight c, the result is W' = W + sum c (F(W) - W), F(W) being what one adapter by
itself makes of W: updates add, each taken from the pristine base, in any order. Replaced tensors are the case F(W) = R.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from peftarray.errors import MatchError, ShapeError
from peftarray.formats.adapters import Adapters, Piece, Ref, Site, matrix_rows

__all__ = ["Contribution", "Part", "Segment", "columns_of", "contributions_of", "segments_of"]


@dataclass(frozen=True)
class Part:
    """A site, and which of its pieces lies in the tensor at hand."""

    site: Site
    piece: Piece


@dataclass(frozen=True)
class Contribution:
    """What one adapter does to one tensor.

    Attributes:
        adapters: the adapter.
        weight: its factor c.
        replacement: the tensor that stands in for the base's, None where the base's is changed.
        parts: sites whose weight lies in it, applied in this order.
        biases: sites whose bias it is.
    """

    adapters: Adapters
    weight: float
    replacement: Ref | None
    parts: tuple[Part, ...]
    biases: tuple[Site, ...]


@dataclass(frozen=True)
class Segment:
    """Rows `begin:end` of a tensor, seen as a matrix, that the same parts change."""

    begin: int
    end: int
    contributions: tuple[Contribution, ...]


def contributions_of(adapters: Sequence[tuple[Adapters, float]]) -> dict[str, tuple[Contribution, ...]]:
    """Output tensor -> what each adapter does to it."""
    found: dict[str, list[Contribution]] = defaultdict(list)
    for adapter, weight in adapters:
        parts: dict[str, list[Part]] = defaultdict(list)
        biases: dict[str, list[Site]] = defaultdict(list)
        for site in adapter.sites:
            touched = site.method.touches(site.layer)
            if "weight" in touched:
                for piece in site.pieces:
                    parts[piece.tensor].append(Part(site, piece))
            if "bias" in touched and site.bias is not None:
                biases[site.bias].append(site)
        for name in dict.fromkeys([*adapter.replace, *parts, *biases, *adapter.untied]):
            made = Contribution(adapter, weight, adapter.replace.get(name), tuple(parts[name]), tuple(biases[name]))
            found[name].append(made)
    return {name: tuple(made) for name, made in found.items()}


def columns_of(name: str, shape: tuple[int, ...], contributions: tuple[Contribution, ...]) -> int:
    """The columns of the matrix that a tensor is seen as."""
    widths = {part.site.stored_matrix[1] for c in contributions for part in c.parts}
    if len(widths) > 1:
        message = (
            f"{name} is seen as matrices of {sorted(widths)} columns by different adapters; merge them one after "
            "the other"
        )
        raise MatchError(message)
    return widths.pop() if widths else (shape[-1] if shape else 1)


def segments_of(
    name: str, shape: tuple[int, ...], columns: int, contributions: tuple[Contribution, ...]
) -> tuple[Segment, ...]:
    """The rows of a tensor, cut where another part begins or ends; none where nothing changes it."""
    if not contributions or not math.prod(shape):
        return ()
    rows = matrix_rows(shape, columns)
    edges = {0, rows}
    for contribution in contributions:
        for part in contribution.parts:
            edges |= {part.piece.at, part.piece.at + part.piece.rows}
    ends = sorted(edges)
    if ends[-1] != rows or rows * columns != math.prod(shape):
        message = f"{name} is {shape}, which cannot be seen as a matrix of {ends[-1]} rows, {columns} columns"
        raise ShapeError(message)
    by_start: dict[int, list[tuple[int, Part]]] = defaultdict(list)
    for i, contribution in enumerate(contributions):
        for part in contribution.parts:
            for edge in ends[ends.index(part.piece.at) : ends.index(part.piece.at + part.piece.rows)]:
                by_start[edge].append((i, part))
    segments = []
    for begin, end in itertools.pairwise(ends):
        kept = []
        for i, c in enumerate(contributions):
            parts = tuple(part for j, part in by_start[begin] if j == i)
            if parts or c.replacement or c.biases:
                kept.append(Contribution(c.adapters, c.weight, c.replacement, parts, c.biases))
        segments.append(Segment(begin, end, tuple(kept)))
    return tuple(segments)
