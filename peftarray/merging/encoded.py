"""A weight that is written quantised: the tensors that it takes, and what they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftarray.dtypes import StorageDType, code_of, decode, encode, storage_dtype
from peftarray.errors import UnsupportedError
from peftarray.merging.contributions import Segment
from peftarray.merging.origin import Origin, QuantisedOrigin
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import TensorInfo

if TYPE_CHECKING:
    from peftarray.quant import Codec
    from peftarray.quant.layouts import StoredWeight, WritableLayout

__all__ = ["Encoded", "planned_tensors"]

_SAMPLE = 256  # rows


@dataclass(frozen=True)
class Encoded:
    """A weight that is quantised as a whole, after it was merged.

    Attributes:
        weight: its name, shape and codec, and whether the model has it transposed.
        layout: how it is written.
        stated: what `config.json` says of the layout.
        code: the dtype that it would have if it were not quantised.
        origin: what it starts as.
        columns: of the matrix that it is seen as.
        segments: what changes it.
        tensors: their places in the shard.
        before: the codes of the base, None where it had none.
    """

    weight: StoredWeight
    layout: WritableLayout
    stated: Mapping[str, Any]
    code: str
    origin: Origin
    columns: int
    segments: tuple[Segment, ...]
    tensors: tuple[TensorInfo, ...]
    before: QuantisedOrigin | None = None

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors)

    @property
    def entries(self) -> int:
        return math.prod(self.weight.shape)

    @property
    def dtype(self) -> StorageDType:
        """What the weight is merged in, before it is quantised."""
        known = storage_dtype("F32")
        assert known is not None
        return known

    def encode(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """What the tensors hold: `matrix` is the weight with `columns` columns, in float32.

        Raises:
            NumberError: a number is not finite.
        """
        values = matrix.reshape(self.origin.shape)
        if self.weight.transposed:
            values = np.ascontiguousarray(np.swapaxes(values, -1, -2))
        parts = self.weight.codec.quantize(values)
        written = self.layout.write(self.name, self.weight.shape, self.weight.codec, parts, dtype=self.code)
        return {info.name: _as_planned(written[info.name], info) for info in self.tensors}

    def stored(self, written: Mapping[str, np.ndarray]) -> StoredWeight:
        """The weight as a reader finds it in the tensors."""
        infos = {info.name: info for info in self.tensors}
        return _read_back(self.layout, self.weight, infos, self.stated, written)


def _as_planned(array: np.ndarray, info: TensorInfo) -> np.ndarray:
    """In the dtype of the header: scales may be shorter floats there than a codec makes them."""
    known = storage_dtype(info.code)
    assert known is not None
    if code_of(array.dtype) == info.code:
        return array
    return encode(decode(array, _dtype_of(array)), known)


def _dtype_of(array: np.ndarray) -> StorageDType:
    known = storage_dtype(code_of(array.dtype))
    assert known is not None
    return known


def planned_tensors(
    layout: WritableLayout, weight: StoredWeight, stated: Mapping[str, Any], code: str, before: Checkpoint | None = None
) -> tuple[TensorInfo, ...]:
    """The tensors that a weight will take, without their places; scales are as long as those of `before`.

    Raises:
        ShapeError: no weight of this shape can be stored so.
        UnsupportedError: the codec only reads, or the layout has no way to store its weights or to tell how.
    """
    _check_writable(weight)
    found = []
    zeros = layout.zeros(weight.name, weight.shape, weight.codec, dtype=code)
    for name, array in zeros.items():
        planned = storage_dtype(code_of(array.dtype))
        there = storage_dtype(before[name].code) if before is not None and name in before else None
        assert planned is not None
        kept = there if there is not None and there.floating and planned.floating and planned.bits > 8 else planned
        found.append(TensorInfo(name, kept.code, array.shape, 0, array.size * kept.bits // 8))
    if before is not None:
        missing = [name for name in weight.tensors.values() if name not in {info.name for info in found}]
        if missing:
            message = f"{weight.name} has the tensor {missing[0]}, which the layout {layout.kind} does not write again"
            raise UnsupportedError(message)
    infos = {info.name: info for info in found}
    again = _read_back(layout, weight, infos, stated, zeros)
    if again.codec != weight.codec:
        _check_same(weight.codec, again.codec, weight)
    return tuple(found)


def _check_writable(weight: StoredWeight) -> None:
    """That the codec quantises, by the smallest weight that is like this one."""
    rows = min(weight.shape[0], weight.codec.row_step(weight.shape)) if len(weight.shape) == 2 else 1
    weight.codec.quantize(np.zeros((rows, *weight.shape[1:]), np.float32))


def _read_back(
    layout: WritableLayout,
    weight: StoredWeight,
    infos: Mapping[str, TensorInfo],
    stated: Mapping[str, Any],
    written: Mapping[str, np.ndarray],
) -> StoredWeight:
    """The weight as the layout finds it.

    Raises:
        UnsupportedError: it would be taken for another one.
    """
    found = [one for one in layout.find(infos, stated, written.__getitem__) if one.name == weight.name]
    if len(found) != 1 or found[0].shape != weight.shape:
        message = (
            f"{weight.name} cannot be quantised with {weight.codec}: the layout {layout.kind} would be read back "
            f"otherwise ({found[0].codec if found else 'not at all'}); choose other settings"
        )
        raise UnsupportedError(message)
    return found[0]


def _check_same(codec: Codec, other: Codec, weight: StoredWeight) -> None:
    """That two codecs are the same for a weight: a group as wide as its rows is none.

    Raises:
        UnsupportedError: they are not.
    """
    shape = (min(weight.shape[0], _SAMPLE), *weight.shape[1:])
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    parts = codec.quantize(values)
    same = {name: part.shape for name, part in codec.parts(shape).items()}
    theirs = {name: part.shape for name, part in other.parts(shape).items()}
    if {name: math.prod(size) for name, size in same.items()} == {name: math.prod(n) for name, n in theirs.items()}:
        as_theirs = {name: array.reshape(theirs[name]) for name, array in parts.items()}
        if np.array_equal(codec.dequantize(parts, shape), other.dequantize(as_theirs, shape)):
            return
    message = f"{weight.name} cannot be quantised with {codec}: it would be read back as {other}; choose other settings"
    raise UnsupportedError(message)
