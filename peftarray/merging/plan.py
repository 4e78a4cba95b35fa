"""What a plan is: every tensor that will be written, what it starts from and what changes it, placed in files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftarray.dtypes import StorageDType, storage_dtype
from peftarray.errors import ConfigError, UnsupportedError
from peftarray.formats.adapters import Adapters
from peftarray.merging.base import Base
from peftarray.merging.contributions import Segment
from peftarray.merging.encoded import Encoded
from peftarray.merging.origin import Origin, StoredOrigin
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import TensorInfo, header_bytes

__all__ = ["Form", "Item", "Output", "Plan", "Shard", "facts_of", "packed_plan"]


@dataclass(frozen=True)
class Form:
    """How a result is written.

    Attributes:
        dtype: the dtype of every floating tensor, None for each its own.
        requantise: whether weights that the base stores quantised, and an adapter changes, are quantised again.
        keep_touched: the dtype of those, where they are not, and the others stay quantised.
        max_shard_size: bytes of a file at most; None for the files of the base.
    """

    dtype: StorageDType | None = None
    requantise: bool = False
    keep_touched: StorageDType | None = None
    max_shard_size: int | None = None

    @property
    def quantised(self) -> bool:
        """Whether what the base stores quantised stays so where no adapter changes it."""
        return self.requantise or self.keep_touched is not None


@dataclass(frozen=True)
class Output:
    """One tensor of the result whose numbers are written as they are.

    Attributes:
        info: its name, dtype, shape and place in its shard.
        origin: what it starts as.
        columns: of the matrix that it is seen as.
        segments: what changes it; none where its values stay.
    """

    info: TensorInfo
    origin: Origin
    columns: int
    segments: tuple[Segment, ...] = ()

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of a tensor in a file."""
        return not self.segments and isinstance(self.origin, StoredOrigin) and self.origin.info.code == self.info.code

    @property
    def dtype(self) -> StorageDType:
        return _known(self.info)


@dataclass(frozen=True)
class Shard:
    """One file of the result."""

    name: str
    header: bytes
    items: tuple[Output | Encoded, ...]

    @property
    def nbytes(self) -> int:
        return max((info.end for info in self.tensors), default=len(self.header))

    @property
    def tensors(self) -> list[TensorInfo]:
        """What the header names."""
        return [info for item in self.items for info in (item.tensors if isinstance(item, Encoded) else (item.info,))]


@dataclass(frozen=True)
class Plan:
    """All that will be done.

    Attributes:
        base: what it starts from.
        adapters: (adapter, weight) pairs.
        shards: the files to write.
        index: the index to write, None for one unsharded file.
        index_name: its name.
        form: how the result is written.
        config: what `config.json` will say, but for what adapters and the dtype change.
        fingerprint: hash of the inputs and options; equal fingerprints give equal bytes.
    """

    base: Base
    adapters: tuple[tuple[Adapters, float], ...]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    index_name: str
    form: Form
    config: Mapping[str, Any]
    fingerprint: str

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def outputs(self) -> list[Output]:
        """Tensors that are copied, converted or merged."""
        return [item for shard in self.shards for item in shard.items if isinstance(item, Output)]

    @property
    def encoded(self) -> list[Encoded]:
        """Weights that are quantised."""
        return [item for shard in self.shards for item in shard.items if isinstance(item, Encoded)]


@dataclass(frozen=True)
class Item:
    """What will be written, before it has a place in a file.

    Attributes:
        tensors: what it takes there; their places say nothing but how long they are.
        placed: makes it, given the places.
    """

    tensors: tuple[TensorInfo, ...]
    placed: Callable[[tuple[TensorInfo, ...]], Output | Encoded]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors)


def packed_plan(
    base: Base,
    adapters: Sequence[tuple[Adapters, float]],
    groups: Sequence[tuple[str, Sequence[Item]]],
    form: Form,
    *,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Plan:
    """The plan that writes items into files.

    Args:
        base, adapters, form, config: as the plan has them.
        groups: the files of the base, and what becomes of the tensors in each.
        facts: what the result depends on, for the fingerprint.
    """
    if form.max_shard_size is not None:
        groups = _packed([item for _, items in groups for item in items], form.max_shard_size)
    headers = {name: shard.metadata for name, shard in base.files.shards.items()}
    default = next(iter(headers.values()), {}) or {"format": "pt"}
    # A base of one file keeps it even if it holds nothing.
    groups = [(name, items) for name, items in groups if items or len(groups) == 1]
    shards = tuple(_shard(name, items, headers.get(name) or default) for name, items in groups)
    index = None
    if len(shards) > 1 or base.files.index_name is not None:
        tensors = [info for shard in shards for info in shard.tensors]
        metadata = dict(base.files.index_metadata) | {"total_size": sum(info.nbytes for info in tensors)}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(info.shape) for info in tensors)
        where = sorted((info.name, shard.name) for shard in shards for info in shard.tensors)
        index = {"metadata": metadata, "weight_map": dict(where)}
    index_name = base.files.index_name or "model.safetensors.index.json"
    every = {"format": 3, "base": facts_of(base.files), "config": base.files.config, "options": facts}
    every["form"] = [form.dtype and form.dtype.code, form.requantise, form.keep_touched and form.keep_touched.code]
    every["original"] = facts_of(base.original) if base.original is not None else None
    every["max_shard_size"] = form.max_shard_size
    fingerprint = hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()
    return Plan(base, tuple(adapters), shards, index, index_name, form, config, fingerprint)


def facts_of(checkpoint: Checkpoint) -> list[list[Any]]:
    """What tells a checkpoint from another, or from itself at an earlier time."""
    return [
        [name, file.size, file.modified, hashlib.sha256(file.header).hexdigest()]
        for name, file in checkpoint.shards.items()
    ]


def _known(info: TensorInfo) -> StorageDType:
    dtype = storage_dtype(info.code)
    if dtype is None:
        message = f"{info.name} has dtype {info.code}, which is not known here"
        raise UnsupportedError(message)
    return dtype


def _packed(items: list[Item], limit: int) -> list[tuple[str, list[Item]]]:
    if limit < 1:
        message = f"max_shard_size is {limit}; it must be at least 1 byte"
        raise ConfigError(message)
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _shard(name: str, items: Sequence[Item], metadata: Mapping[str, str]) -> Shard:
    tensors = [info for item in items for info in item.tensors]
    head = header_bytes([(info.name, info.code, info.shape, info.nbytes) for info in tensors], metadata)
    made, at = [], len(head)
    for item in items:
        places = []
        for info in item.tensors:
            places.append(TensorInfo(info.name, info.code, info.shape, at, at + info.nbytes))
            at += info.nbytes
        made.append(item.placed(tuple(places)))
    return Shard(name, head, tuple(made))
