"""Checkpoints of packed integers that other tools wrote: GPTQ, AWQ, MLX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, final

import numpy as np

from peftarray.errors import FormatError, UnsupportedError
from peftarray.quant.awq import AWQ
from peftarray.quant.codec import Codec
from peftarray.quant.gptq import GPTQ
from peftarray.quant.layouts.layout import Header, Layout, Read, StoredWeight, WritableLayout, require
from peftarray.quant.mlx import MLX

__all__ = ["AWQLayout", "GPTQLayout", "MLXLayout", "order_of"]


@final
class GPTQLayout(Layout):
    """`p.qweight`, `p.qzeros`, `p.scales`, `p.g_idx`."""

    kind: ClassVar[str] = "gptq"

    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterator[StoredWeight]:
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        for module in modules(tensors, ".qweight"):
            words, zeros, scale = (matrix(tensors, f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
            rows, groups = scale[1], scale[0]
            bits = exact(zeros[1] * 32, rows, f"{module}.qzeros")
            columns = exact(words[0] * 32, bits, f"{module}.qweight")
            name = f"{module}.g_idx"
            group, scattered = order_of(name, tensors, read, columns=columns, groups=groups)
            codec = GPTQ(bits=bits, group=group, version=version, act_order=scattered)
            found = {"codes": f"{module}.qweight", "zeros": f"{module}.qzeros", "scale": f"{module}.scales"}
            others = (name,) if name in tensors and not scattered else ()
            found |= {"g_idx": name} if scattered else {}
            yield StoredWeight(f"{module}.weight", (rows, columns), codec, found, others=others)


@final
class AWQLayout(Layout):
    """`p.qweight`, `p.qzeros`, `p.scales`, packed along the rows."""

    kind: ClassVar[str] = "awq"
    skip_list: ClassVar[str | None] = "modules_to_not_convert"

    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterator[StoredWeight]:
        version = config.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            message = f"config.json says that the awq weights are packed as {version!r}; known is gemm"
            raise UnsupportedError(message)
        if config.get("bits", 4) != 4:
            message = f"config.json says that the awq weights have {config['bits']!r} bits; known are 4"
            raise UnsupportedError(message)
        for module in modules(tensors, ".qweight"):
            words, scale = (matrix(tensors, f"{module}.{part}") for part in ("qweight", "scales"))
            require(tensors, f"{module}.qzeros", f"{module}.qweight")
            group = exact(words[0], scale[0], f"{module}.scales")
            found = {"codes": f"{module}.qweight", "zeros": f"{module}.qzeros", "scale": f"{module}.scales"}
            codec = AWQ(group=0 if scale[0] == 1 else group)
            yield StoredWeight(f"{module}.weight", (scale[1], words[0]), codec, found)


@final
class MLXLayout(WritableLayout):
    """`p.weight` of unsigned words with `p.scales` and `p.biases`; `config.json` calls it `quantization`."""

    kind: ClassVar[str] = "mlx"
    stated_in: ClassVar[str] = "quantization"

    def skipping(self, stated: Mapping[str, Any], modules: Iterable[str], others: Iterable[str]) -> dict[str, Any]:
        return dict(stated) | dict.fromkeys(modules, False)

    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterator[StoredWeight]:
        for module in modules(tensors, ".biases"):
            own = config.get(module)
            mine = own if isinstance(own, Mapping) else config
            group, mode = mine.get("group_size", 64), mine.get("mode", "affine")
            if mode != "affine" or type(group) is not int or group < 1:
                message = f"config.json says mode {mode!r} and group_size {group!r} for {module}; known is affine"
                raise UnsupportedError(message)
            words = require(tensors, f"{module}.weight", f"{module}.biases").shape
            scale = require(tensors, f"{module}.scales", f"{module}.biases").shape
            columns = scale[-1] * group
            codec = MLX(bits=exact(words[-1] * 32, columns, f"{module}.weight"), group=group)
            found = {"codes": f"{module}.weight", "scale": f"{module}.scales", "bias": f"{module}.biases"}
            yield StoredWeight(f"{module}.weight", (*words[:-1], columns), codec, found)

    def write(
        self, name: str, shape: tuple[int, ...], codec: Codec, parts: Mapping[str, np.ndarray], *, dtype: str
    ) -> dict[str, np.ndarray]:
        if not isinstance(codec, MLX):
            raise self.refuse(codec)
        module = name.removesuffix(".weight")
        return {
            f"{module}.weight": parts["codes"].view(np.uint32),
            f"{module}.scales": parts["scale"],
            f"{module}.biases": parts["bias"],
        }

    def config(self, codec: Codec, *, skipped: Iterable[str], dtype: str) -> dict[str, Any]:
        if not isinstance(codec, MLX):
            raise self.refuse(codec)
        return {"group_size": codec.group, "bits": codec.bits, "mode": "affine"} | dict.fromkeys(skipped, False)


def modules(tensors: Mapping[str, Header], suffix: str) -> Iterator[str]:
    """The modules that have a tensor of this name."""
    for name in tensors:
        if name.endswith(suffix):
            yield name.removesuffix(suffix)


def matrix(tensors: Mapping[str, Header], name: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix.

    Raises:
        FormatError: it is none, or is not there.
    """
    shape = require(tensors, name, "parts of a packed weight").shape
    if len(shape) != 2 or not all(shape):
        message = f"{name} has shape {tuple(shape)}; it must be a matrix; the file is damaged or of another kind"
        raise FormatError(message)
    return shape[0], shape[1]


def exact(whole: int, part: int, name: str) -> int:
    """How many parts the whole has.

    Raises:
        FormatError: it is no whole number of at least 1.
    """
    if part < 1 or whole % part or whole < part:
        message = f"the shape of {name} does not fit the tensors beside it; the file is damaged or of another kind"
        raise FormatError(message)
    return whole // part


def order_of(name: str, tensors: Mapping[str, Header], read: Read, *, columns: int, groups: int) -> tuple[int, bool]:
    """The columns of a group, and whether its columns are scattered, as a tensor with the group of each column says.

    Raises:
        FormatError: it has another length, or names a group that there is not.
    """
    group = 0 if groups == 1 else -(-columns // groups)
    if name not in tensors:
        return group, False
    if tuple(tensors[name].shape) != (columns,):
        message = f"{name} has shape {tuple(tensors[name].shape)}; it must be {(columns,)}, a group for each column"
        raise FormatError(message)
    index = read(name)
    if index.dtype.kind not in "iu" or (columns and (index.min() < 0 or index.max() >= groups)):
        message = f"{name} names groups that are not there: there are {groups}; the file is damaged"
        raise FormatError(message)
    return group, not np.array_equal(index, np.arange(columns) // (group or columns))
