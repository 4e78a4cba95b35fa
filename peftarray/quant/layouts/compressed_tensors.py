"""compressed-tensors' checkpoints: packed and plain integers, floats of eight and of four bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, final

import numpy as np

from peftarray.errors import FormatError, UnsupportedError
from peftarray.quant.codebooks import float8
from peftarray.quant.codec import Codec, entries
from peftarray.quant.fp8 import FP8
from peftarray.quant.integers import word_count
from peftarray.quant.ints import Ints
from peftarray.quant.layouts.fp8 import block_of, find_float8
from peftarray.quant.layouts.layout import Header, Read, StoredWeight, WritableLayout, require
from peftarray.quant.layouts.packed import exact, matrix, modules, order_of
from peftarray.quant.mx import MXFP4, NVFP4

__all__ = ["CompressedTensors"]


@final
class CompressedTensors(WritableLayout):
    """`p.weight_packed` or `p.weight` with `p.weight_scale`, and what else the format needs.

    What a weight is follows from its own tensors; groups of targets in `config.json` are not asked.
    """

    kind: ClassVar[str] = "compressed-tensors"
    skip_list: ClassVar[str | None] = "ignore"

    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterator[StoredWeight]:
        yield from find_float8(tensors, block_of(_block(config)))
        for module in modules(tensors, ".weight_packed"):
            code = tensors[f"{module}.weight_packed"].code
            yield _packed_ints(module, tensors, read) if code == "I32" else _packed_floats(module, tensors)
        for module in modules(tensors, ".weight"):
            if tensors[f"{module}.weight"].code == "I8":
                require(tensors, f"{module}.weight_scale", f"{module}.weight")
                yield _plain_ints(module, tensors, read)

    def write(
        self, name: str, shape: tuple[int, ...], codec: Codec, parts: Mapping[str, np.ndarray], *, dtype: str
    ) -> dict[str, np.ndarray]:
        if isinstance(codec, FP8) and codec.scale_dtype == "F32":
            scale = parts["scale"].reshape(1) if codec.scale == "tensor" else parts["scale"]
            return {name: parts["codes"].view(float8(codec.dtype)), f"{name}_scale": scale}
        if isinstance(codec, MXFP4):
            return {f"{name}_packed": parts["codes"], f"{name}_scale": parts["scale"]}
        if isinstance(codec, NVFP4) and codec.global_scale == "divide":
            return {
                f"{name}_packed": parts["codes"],
                f"{name}_scale": parts["scale"].view(float8("F8_E4M3")),
                f"{name}_global_scale": parts["global_scale"].reshape(1),
            }
        if not isinstance(codec, Ints):
            raise self.refuse(codec)
        found = {f"{name}_packed" if codec.packed else name: parts["codes"], f"{name}_scale": parts["scale"]}
        if codec.packed:
            found[f"{name}_shape"] = np.array(shape, np.int64)
        if not codec.symmetric:
            found[f"{name}_zero_point"] = parts["zeros"]
        return found

    def config(self, codec: Codec, *, skipped: Iterable[str], dtype: str) -> dict[str, Any]:
        form, weights = self._scheme(codec)
        group = {"weights": weights, "input_activations": None, "output_activations": None, "targets": ["Linear"]}
        return {
            "quant_method": self.kind,
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"format": form}},
            "ignore": list(skipped),
        }

    def _scheme(self, codec: Codec) -> tuple[str, dict[str, Any]]:
        """The format, and what compressed-tensors calls the arguments of a quantisation."""
        common = {"symmetric": True, "dynamic": False, "observer": "minmax"}
        if isinstance(codec, FP8) and codec.scale_dtype == "F32" and codec.dtype == "F8_E4M3":
            strategy = {"tensor": "tensor", "row": "channel", "block": "block"}[codec.scale]
            block = {"block_structure": list(codec.block)} if codec.scale == "block" else {}
            return "float-quantized", common | {"num_bits": 8, "type": "float", "strategy": strategy} | block
        if isinstance(codec, MXFP4):
            group = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
            return "mxfp4-pack-quantized", common | {"num_bits": 4, "type": "float"} | group
        if isinstance(codec, NVFP4) and codec.global_scale == "divide":
            group = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
            return "nvfp4-pack-quantized", common | {"num_bits": 4, "type": "float"} | group
        if not isinstance(codec, Ints):
            raise self.refuse(codec)
        form = "pack-quantized" if codec.packed else "int-quantized"
        group = {"strategy": "group", "group_size": codec.group} if codec.group else {"strategy": "channel"}
        return form, common | {"num_bits": codec.bits, "type": "int", "symmetric": codec.symmetric} | group


def _block(config: Mapping[str, Any]) -> object:
    """The first block structure that a group of targets states."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("block_structure") is not None:
            return weights["block_structure"]
    return None


def _packed_ints(module: str, tensors: Mapping[str, Header], read: Read) -> StoredWeight:
    packed, shape_name = f"{module}.weight_packed", f"{module}.weight_shape"
    words, scale = matrix(tensors, packed), matrix(tensors, f"{module}.weight_scale")
    if entries(require(tensors, shape_name, packed).shape) != 2:
        message = f"{shape_name} must hold two numbers; the file is damaged or of another kind"
        raise FormatError(message)
    rows, columns = (int(n) for n in read(shape_name).reshape(-1))
    fitting = [bits for bits in range(1, 9) if columns > 0 and word_count(columns, bits) == words[1]]
    if rows != words[0] or not fitting:
        message = f"{shape_name} says {(rows, columns)}, and {packed} has shape {words}; the file is damaged"
        raise FormatError(message)
    if len(fitting) > 1:
        # Few columns: the words do not tell, and neither does anything else in the tensors.
        message = f"{packed} may have {' or '.join(map(str, fitting))} bits; so few columns cannot be read here"
        raise UnsupportedError(message)
    zero, index = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
    group, scattered = order_of(index, tensors, read, columns=columns, groups=scale[1])
    codec = Ints(bits=fitting[0], group=group, symmetric=zero not in tensors, act_order=scattered)
    found = {"codes": packed, "scale": f"{module}.weight_scale"}
    found |= {"zeros": zero} if zero in tensors else {}
    found |= {"g_idx": index} if scattered else {}
    others = (shape_name, *((index,) if index in tensors and not scattered else ()), *_activations(module, tensors))
    return StoredWeight(f"{module}.weight", (rows, columns), codec, found, others=others)


def _plain_ints(module: str, tensors: Mapping[str, Header], read: Read) -> StoredWeight:
    rows, columns = matrix(tensors, f"{module}.weight")
    scale = tensors[f"{module}.weight_scale"].shape
    groups = scale[1] if len(scale) == 2 else 1
    zero, index = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
    group, scattered = order_of(index, tensors, read, columns=columns, groups=max(1, groups))
    codec = Ints(bits=8, group=group, symmetric=zero not in tensors, packed=False, act_order=scattered)
    found = {"codes": f"{module}.weight", "scale": f"{module}.weight_scale"}
    found |= {"zeros": zero} if zero in tensors else {}
    found |= {"g_idx": index} if scattered else {}
    others = (*((index,) if index in tensors and not scattered else ()), *_activations(module, tensors))
    return StoredWeight(f"{module}.weight", (rows, columns), codec, found, others=others)


def _packed_floats(module: str, tensors: Mapping[str, Header]) -> StoredWeight:
    packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
    codes, groups = matrix(tensors, packed), matrix(tensors, scale)
    size = exact(codes[1] * 2, groups[1], scale)
    found = {"codes": packed, "scale": scale}
    whole = f"{module}.weight_global_scale"
    if size == 16:
        require(tensors, whole, packed)
    if tensors[packed].code != "U8" or size not in (16, 32):
        message = f"{packed} has dtype {tensors[packed].code} and groups of {size}; known are NVFP4 (16) and MXFP4 (32)"
        raise UnsupportedError(message)
    codec: Codec = NVFP4() if size == 16 else MXFP4()
    found |= {"global_scale": whole} if size == 16 else {}
    shape = (codes[0], codes[1] * 2)
    return StoredWeight(f"{module}.weight", shape, codec, found, others=_activations(module, tensors))


def _activations(module: str, tensors: Mapping[str, Header]) -> tuple[str, ...]:
    """Tensors that say how activations are quantised, which changes nothing in a weight."""
    names = (f"{module}.{name}" for name in ("input_scale", "input_zero_point", "input_global_scale"))
    return tuple(name for name in names if name in tensors)
