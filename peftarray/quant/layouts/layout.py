"""What a layout is: under which names, dtypes and shapes a checkpoint holds the parts of quantised weights."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, final

import numpy as np

from peftarray.dtypes import storage_dtype
from peftarray.errors import FormatError, UnsupportedError
from peftarray.quant.codec import Codec, Part, entries

__all__ = ["Header", "Layout", "Read", "StoredWeight", "WritableLayout", "as_part", "require"]

Read = Callable[[str], np.ndarray]
"""A tensor of the checkpoint by its name, in its storage dtype."""

_BYTES = ("U8", "I8")
_SHARED = ("scale", "zeros", "global_scale")  # parts of which a file may hold one number for all


class Header(Protocol):
    """What the header of a file says about a tensor."""

    @property
    def code(self) -> str:
        """Its dtype by the name of safetensors headers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight that a checkpoint stores quantised.

    Attributes:
        name: the name that it would have if it were not quantised.
        shape: its shape then.
        codec: how its numbers are stored.
        tensors: part of the codec -> the tensor that holds it.
        constants: parts that no tensor holds.
        dtype: the dtype that it had, by the name of safetensors headers, where the checkpoint says so.
        others: tensors that belong to it and hold none of its numbers.
        transposed: whether the model's parameter is this with its last two axes exchanged.
    """

    name: str
    shape: tuple[int, ...]
    codec: Codec
    tensors: Mapping[str, str]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    dtype: str | None = None
    others: tuple[str, ...] = ()
    transposed: bool = False

    def parts(self, read: Read) -> dict[str, np.ndarray]:
        """The codec's parts: views of what `read` returns, so that tiles may come from a mapped file.

        Raises:
            FormatError: a tensor has a dtype or a size that its part cannot have.
        """
        wanted = self.codec.parts(self.shape)
        found = dict(self.constants)
        for name, tensor in self.tensors.items():
            found[name] = as_part(read(tensor), wanted[name], tensor, spread=name in _SHARED)
        return found

    def dequantize(self, read: Read, *, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The weight, or some of its rows, in float32, as it is stored: see `transposed`."""
        return self.codec.dequantize(self.parts(read), self.shape, rows=rows)

    def check(self, tensors: Mapping[str, Header]) -> None:
        """That the headers of its tensors fit its parts, before anything of them is read.

        Raises:
            FormatError: one does not.
        """
        for name, part in self.codec.parts(self.shape).items():
            if name in self.constants:
                continue
            header = require(tensors, self.tensors[name], self.name)
            known, count = storage_dtype(header.code), entries(tuple(header.shape))
            if known is None:
                message = f"{self.tensors[name]} has dtype {header.code}, which is not known"
                raise UnsupportedError(message)
            as_bytes = part.dtype in _BYTES and count * known.bits == part.nbytes * 8
            as_numbers = part.dtype not in _BYTES and count == entries(part.shape)
            if not (as_bytes or as_numbers or (count == 1 and name in _SHARED)):
                raise FormatError(_misfit(self.tensors[name], header.shape, part))

    def names(self) -> tuple[str, ...]:
        """Every tensor that the weight takes in the checkpoint."""
        return (*self.tensors.values(), *self.others)


class Layout(abc.ABC):
    """How one family of checkpoints stores quantised weights."""

    kind: ClassVar[str]
    """What `quant_method` says in `config.json`."""

    stated_in: ClassVar[str] = "quantization_config"
    """The field of `config.json` that says so."""

    skip_list: ClassVar[str | None] = None
    """The field of `quantization_config` that lists modules which are not quantised; None where it has none."""

    def skipping(self, stated: Mapping[str, Any], modules: Iterable[str], others: Iterable[str]) -> dict[str, Any]:
        """What `quantization_config` must say once some modules are quantised no more.

        Args:
            stated: what it says.
            modules: these modules.
            others: those that were not quantised before; named where there is no list yet, which stands for them then.

        Raises:
            UnsupportedError: it has no way to say so.
        """
        names = list(modules)
        if not names:
            return dict(stated)
        if self.skip_list is None:
            message = (
                f"the quantization_config of {self.kind} cannot say that {names[0]} is not quantised while others are; "
                "dequantise the whole base instead (--base-as dequantised)"
            )
            raise UnsupportedError(message)
        listed = stated.get(self.skip_list)
        before = listed if isinstance(listed, list) else list(others)
        return dict(stated) | {self.skip_list: list(dict.fromkeys([*before, *names]))}

    @abc.abstractmethod
    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterable[StoredWeight]:
        """The weights that are stored quantised.

        Args:
            tensors: name -> header, for every tensor of the checkpoint.
            config: what `quantization_config` says; empty where there is none.
            read: reads small tensors that say how others are to be understood.

        Raises:
            FormatError: tensors contradict each other.
            UnsupportedError: they are stored in a way that is not known here.
        """


class WritableLayout(Layout):
    """A layout that this package also writes."""

    @abc.abstractmethod
    def write(
        self, name: str, shape: tuple[int, ...], codec: Codec, parts: Mapping[str, np.ndarray], *, dtype: str
    ) -> dict[str, np.ndarray]:
        """The tensors that hold a weight's parts, by name.

        Args:
            name: the weight's name.
            shape: its shape.
            codec: what made the parts.
            parts: NumPy arrays.
            dtype: the dtype that it had, by the name of safetensors headers.

        Raises:
            UnsupportedError: this layout has no way to store them.
        """

    @abc.abstractmethod
    def config(self, codec: Codec, *, skipped: Iterable[str], dtype: str) -> dict[str, Any]:
        """What `quantization_config` must say in `config.json` for weights of this codec.

        Args:
            codec: what made the weights.
            skipped: names of modules whose weights are not quantised.
            dtype: the dtype that the weights had.

        Raises:
            UnsupportedError: this layout has no way to store them.
        """

    @final
    def zeros(self, name: str, shape: tuple[int, ...], codec: Codec, *, dtype: str) -> dict[str, np.ndarray]:
        """What `write` gives for a weight of zeros, in next to no memory: names, shapes and dtypes are those of any.

        Raises:
            ShapeError: no weight of this shape can be stored so.
            UnsupportedError: this layout has no way to store them.
        """
        parts = {}
        for key, part in codec.parts(shape).items():
            known = storage_dtype(part.dtype)
            assert known is not None
            assert known.numpy is not None
            parts[key] = np.broadcast_to(np.zeros((), known.numpy), part.shape)
        return self.write(name, shape, codec, parts, dtype=dtype)

    def refuse(self, codec: Codec) -> UnsupportedError:
        """The error for a codec that this layout does not write."""
        message = f"the layout {self.kind} does not write weights of {codec}; choose another codec or another layout"
        return UnsupportedError(message)


def as_part(stored: np.ndarray, part: Part, name: str, *, spread: bool) -> np.ndarray:
    """A stored tensor as the part of a codec: the same bytes, or with `spread` one number for all.

    Raises:
        FormatError: it has a dtype or a size that the part cannot have.
    """
    known = storage_dtype(part.dtype)
    assert known is not None
    assert known.numpy is not None
    if part.dtype in _BYTES:
        if stored.ndim == 0:
            stored = stored.reshape(1)
        stored = np.ascontiguousarray(stored).view(known.numpy)
    elif part.dtype == "I32":
        if stored.dtype not in (np.int32, np.uint32):
            message = f"{name} has dtype {stored.dtype}; it must be int32; the file is damaged or of another kind"
            raise FormatError(message)
        stored = stored.view(np.int32)
    elif not _is_float(stored.dtype):
        message = f"{name} has dtype {stored.dtype}; scales are floating numbers; the file is of another kind"
        raise FormatError(message)
    if stored.size == entries(part.shape):
        return stored.reshape(part.shape)
    if spread and stored.size == 1:
        return np.broadcast_to(stored.reshape(()), part.shape)  # a view, without a copy
    raise FormatError(_misfit(name, stored.shape, part))


def _misfit(name: str, shape: tuple[int, ...], part: Part) -> str:
    return (
        f"{name} has shape {tuple(shape)}, and the weight needs {part.shape} of {part.dtype}; the file is damaged or "
        "of another kind"
    )


def _is_float(dtype: np.dtype) -> bool:
    # ml_dtypes' floats are of NumPy's kind "V", or "f".
    return dtype.kind == "f" or "float" in dtype.name


def require(tensors: Mapping[str, Header], name: str, needed_by: str) -> Header:
    """The header of a tensor that another one needs.

    Raises:
        FormatError: it is not there.
    """
    if name not in tensors:
        message = f"the checkpoint holds {needed_by}, and not {name}, which it needs; download it again"
        raise FormatError(message)
    return tensors[name]
