"""The plan of a merge, made from headers alone: every output tensor, where its bytes come from and what changes them.

With several adapters, each with a weight c, the result is W' = W + sum c (F(W) - W), F(W) being what one adapter by
itself makes of W: updates add, each taken from the pristine base, in any order. Replaced tensors are the case F(W) = R.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftarray.dtypes import StorageDType, storage_dtype
from peftarray.errors import ConfigError, MatchError, ShapeError, UnsupportedError
from peftarray.formats.adapters import Adapters, Piece, Ref, Site, matrix_rows
from peftarray.merging.fit import check_fit
from peftarray.merging.placement import HOST
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import SafetensorsFile, TensorInfo, header_bytes

__all__ = ["Contribution", "Output", "Part", "Plan", "Segment", "Shard", "make_plan"]


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


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    Attributes:
        name, code, shape: as it will stand in the header.
        begin, end: its bytes in the output shard.
        source: the file and tensor that it starts as.
        columns: of the matrix that it is seen as.
        segments: what changes it; none where its values stay.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int
    source: SafetensorsFile
    info: TensorInfo
    columns: int
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of the source."""
        return not self.segments and self.code == self.info.code

    @property
    def dtype(self) -> StorageDType:
        return _known(self.name, self.code)


@dataclass(frozen=True)
class Shard:
    """One file of the result."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        return self.outputs[-1].end if self.outputs else len(self.header)


@dataclass(frozen=True)
class Plan:
    """All that a merge will do.

    Attributes:
        base: the base.
        adapters: (adapter, weight) pairs.
        shards: the files to write.
        index: the index to write, None for one unsharded file.
        index_name: its name.
        dtype: the dtype that every floating tensor is written in, None for each its own.
        fingerprint: hash of the inputs and options; equal fingerprints give equal bytes.
    """

    base: Checkpoint
    adapters: tuple[tuple[Adapters, float], ...]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    index_name: str
    dtype: StorageDType | None
    fingerprint: str

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def outputs(self) -> list[Output]:
        return [output for shard in self.shards for output in shard.outputs]


def make_plan(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapters, float]],
    *,
    dtype: StorageDType | None = None,
    max_shard_size: int | None = None,
    place: str = HOST.name,
) -> Plan:
    """Plan the merge of adapters, each with its weight, into a base. Reads nothing but what was read already.

    `place` says where the updates will be computed: another library may round them otherwise.

    Raises:
        MatchError: two adapters contradict each other.
        UnsupportedError: a tensor to be changed is not of a floating dtype, or what is asked has no meaning.
    """
    check_fit(base, [adapter for adapter, _ in adapters])
    # One of no weight leaves everything as it is, the sign of a zero included.
    adapters = [(adapter, weight) for adapter, weight in adapters if weight]
    contributions = _contributions(adapters)
    items: list[_Item] = []
    by_shard: list[tuple[str, int]] = []
    for shard_name, shard in base.shards.items():
        for name, info in shard.tensors.items():
            items.append((name, *_start(name, shard, info, contributions.pop(name, ()), dtype)))
        by_shard.append((shard_name, len(items)))
    for name, found in sorted(contributions.items()):
        items.append((name, *_new(name, base, adapters, found, dtype)))
    if max_shard_size is None:
        groups = _as_in_base(items, by_shard)
    else:
        groups = _packed(items, max_shard_size)
    headers = {name: shard.metadata for name, shard in base.shards.items()}
    default = next(iter(headers.values()), {}) or {"format": "pt"}
    shards = tuple(_shard(name, group, headers.get(name) or default) for name, group in groups)
    index = None
    if len(shards) > 1 or base.index_name is not None:
        outputs = [output for shard in shards for output in shard.outputs]
        metadata = dict(base.index_metadata) | {"total_size": sum(output.nbytes for output in outputs)}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(output.shape) for output in outputs)
        index = {
            "metadata": metadata,
            "weight_map": dict(sorted((output.name, shard.name) for shard in shards for output in shard.outputs)),
        }
    fingerprint = _fingerprint(base, adapters, dtype, max_shard_size, place)
    index_name = base.index_name or "model.safetensors.index.json"
    return Plan(base, tuple(adapters), shards, index, index_name, dtype, fingerprint)


def _contributions(adapters: Sequence[tuple[Adapters, float]]) -> dict[str, tuple[Contribution, ...]]:
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


# Code to write, file and tensor to start from, and what changes it; an item has its name before that.
_Started = tuple[str, SafetensorsFile, TensorInfo, tuple[Contribution, ...]]
_Item = tuple[str, str, SafetensorsFile, TensorInfo, tuple[Contribution, ...]]


def _start(
    name: str, shard: SafetensorsFile, info: TensorInfo, found: tuple[Contribution, ...], dtype: StorageDType | None
) -> _Started:
    """Code, source and contributions of a tensor that the base has."""
    known = storage_dtype(info.code)
    floating = known is not None and known.floating
    for contribution in found:
        ref = contribution.replacement
        if ref is None:
            continue
        other = contribution.adapters.tensors[ref.name]
        brought = storage_dtype(other.code)
        if floating != (brought is not None and brought.floating) or (not floating and other.code != info.code):
            message = (
                f"{name} is {info.code} in the base and {other.code} in {contribution.adapters.name}; they must agree"
            )
            raise MatchError(message)
        if other.shape != info.shape or not floating:
            if len(found) > 1 or contribution.weight != 1:
                message = (
                    f"{name} is replaced whole by {contribution.adapters.name}, which cannot be weighted "
                    f"({contribution.weight:g}) or summed; give it the scale 1 and no other adapter for this "
                    "tensor"
                )
                raise UnsupportedError(message)
            rest = Contribution(contribution.adapters, 1.0, None, contribution.parts, contribution.biases)
            kept = (rest,) if rest.parts or rest.biases else ()
            file = contribution.adapters.tensors.shard_of(ref.name)
            return _written(info.code, dtype), file, other, kept
    if found and not floating:
        message = (
            f"{name} is stored as {info.code}, which is not a floating dtype: the base is quantised or packed; "
            "merge into the original checkpoint, or dequantise it first"
        )
        raise UnsupportedError(message)
    return _written(info.code, dtype), shard, info, found


def _new(
    name: str,
    base: Checkpoint,
    adapters: Sequence[tuple[Adapters, float]],
    found: tuple[Contribution, ...],
    dtype: StorageDType | None,
) -> _Started:
    """Code, source and contributions of a tensor that the base lacks."""
    for adapter, _ in adapters:
        if name in adapter.untied:
            info = base[adapter.untied[name]]
            changing = tuple(c for c in found if c.replacement or c.parts or c.biases)
            return _written(info.code, dtype), base.shard_of(adapter.untied[name]), info, changing
    if len(found) > 1 or found[0].weight != 1:
        message = (
            f"{name} is new, brought by {found[0].adapters.name}; it cannot be weighted or summed; give that "
            "adapter the scale 1"
        )
        raise UnsupportedError(message)
    ref = found[0].replacement
    if ref is None:
        message = f"{name} is changed by {found[0].adapters.name}, and the base does not have it"
        raise MatchError(message)
    info = found[0].adapters.tensors[ref.name]
    kept = (Contribution(found[0].adapters, 1.0, None, found[0].parts, found[0].biases),) if found[0].parts else ()
    return _written(info.code, dtype), found[0].adapters.tensors.shard_of(ref.name), info, kept


def _written(code: str, dtype: StorageDType | None) -> str:
    known = storage_dtype(code)
    # Only numbers that a model computes with are converted: not indices, not packed or scaled codes.
    return dtype.code if dtype is not None and known is not None and known.floating and known.bits > 8 else code


def _known(name: str, code: str) -> StorageDType:
    dtype = storage_dtype(code)
    if dtype is None:
        message = f"{name} has dtype {code}, which is not known here"
        raise UnsupportedError(message)
    return dtype


def _as_in_base(items: list[_Item], by_shard: list[tuple[str, int]]) -> list[tuple[str, list[_Item]]]:
    groups: list[tuple[str, list[_Item]]] = []
    start = 0
    for name, end in by_shard:
        groups.append((name, items[start:end]))
        start = end
    if groups:
        groups[-1][1].extend(items[start:])
    return groups


def _packed(items: list[_Item], limit: int) -> list[tuple[str, list[_Item]]]:
    if limit < 1:
        message = f"max_shard_size is {limit}; it must be at least 1 byte"
        raise ConfigError(message)
    groups: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        nbytes = _out_bytes(item[3], item[1])
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _out_bytes(info: TensorInfo, code: str) -> int:
    if code == info.code:
        return info.nbytes
    return info.nbytes * _known(info.name, code).bits // info.dtype.bits


def _shard(name: str, items: list[_Item], metadata: dict[str, str]) -> Shard:
    head = header_bytes([(i[0], i[1], i[3].shape, _out_bytes(i[3], i[1])) for i in items], metadata)
    outputs, at = [], len(head)
    for tensor, code, source, info, contributions in items:
        end = at + _out_bytes(info, code)
        columns = _columns(tensor, info, contributions)
        segments = _segments(info, columns, contributions)
        outputs.append(Output(tensor, code, info.shape, at, end, source, info, columns, segments))
        at = end
    return Shard(name, head, tuple(outputs))


def _columns(name: str, info: TensorInfo, contributions: tuple[Contribution, ...]) -> int:
    widths = {part.site.stored_matrix[1] for c in contributions for part in c.parts}
    if len(widths) > 1:
        message = (
            f"{name} is seen as matrices of {sorted(widths)} columns by different adapters; merge them one after "
            "the other"
        )
        raise MatchError(message)
    return widths.pop() if widths else (info.shape[-1] if info.shape else 1)


def _segments(info: TensorInfo, columns: int, contributions: tuple[Contribution, ...]) -> tuple[Segment, ...]:
    if not contributions or not info.nbytes:
        return ()
    rows = matrix_rows(info.shape, columns)
    edges = {0, rows}
    for contribution in contributions:
        for part in contribution.parts:
            edges |= {part.piece.at, part.piece.at + part.piece.rows}
    ends = sorted(edges)
    if ends[-1] != rows or rows * columns != math.prod(info.shape):
        message = f"{info.name} is {info.shape}, which cannot be seen as a matrix of {ends[-1]} rows, {columns} columns"
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


def _fingerprint(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapters, float]],
    dtype: StorageDType | None,
    max_shard_size: int | None,
    place: str,
) -> str:
    def files(checkpoint: Checkpoint) -> list[list[Any]]:
        return [
            [name, file.size, file.modified, hashlib.sha256(file.header).hexdigest()]
            for name, file in checkpoint.shards.items()
        ]

    facts = {
        "format": 2,
        "base": files(base),
        "config": base.config,
        "adapters": [[files(a.tensors), repr(a.config), weight] for a, weight in adapters],
        "dtype": dtype.code if dtype else None,
        "max_shard_size": max_shard_size,
        "place": place,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
