"""Checkpoints of OCP's four-bit floats beside compressed-tensors': gpt-oss and ModelOpt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, final

import numpy as np

from peftarray.errors import FormatError
from peftarray.quant.codec import Codec
from peftarray.quant.layouts.fp8 import block_of, find_float8
from peftarray.quant.layouts.layout import Header, Layout, Read, StoredWeight, WritableLayout, require
from peftarray.quant.layouts.packed import matrix, modules
from peftarray.quant.mx import MXFP4, NVFP4

__all__ = ["GptOss", "ModelOpt"]

_GROUP = 32


@final
class GptOss(WritableLayout):
    """`p_blocks` `(experts, rows, groups, 16)` and `p_scales`, of a parameter `p` that the model holds transposed."""

    kind: ClassVar[str] = "mxfp4"
    skip_list: ClassVar[str | None] = "modules_to_not_convert"

    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterator[StoredWeight]:
        for name in modules(tensors, "_blocks"):
            blocks = tuple(tensors[f"{name}_blocks"].shape)
            scales = tuple(require(tensors, f"{name}_scales", f"{name}_blocks").shape)
            if len(blocks) < 3 or blocks[-1] * 2 != _GROUP or scales != blocks[:-1]:
                message = f"{name}_blocks has shape {blocks} and {name}_scales {scales}; known are groups of {_GROUP}"
                raise FormatError(message)
            shape = (*blocks[:-2], blocks[-2] * _GROUP)
            found = {"codes": f"{name}_blocks", "scale": f"{name}_scales"}
            yield StoredWeight(name, shape, MXFP4(), found, transposed=True)

    def write(
        self, name: str, shape: tuple[int, ...], codec: Codec, parts: Mapping[str, np.ndarray], *, dtype: str
    ) -> dict[str, np.ndarray]:
        if not isinstance(codec, MXFP4):
            raise self.refuse(codec)
        blocks = parts["codes"].reshape(*shape[:-1], -1, _GROUP // 2)
        return {f"{name}_blocks": blocks, f"{name}_scales": parts["scale"]}

    def config(self, codec: Codec, *, skipped: Iterable[str], dtype: str) -> dict[str, Any]:
        if not isinstance(codec, MXFP4):
            raise self.refuse(codec)
        return {"quant_method": self.kind, "modules_to_not_convert": list(skipped)}


@final
class ModelOpt(Layout):
    """`p.weight` with `p.weight_scale` and, for NVFP4, `p.weight_scale_2`, which is multiplied."""

    kind: ClassVar[str] = "modelopt"
    skip_list: ClassVar[str | None] = "ignore"

    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterator[StoredWeight]:
        yield from find_float8(tensors, block_of(config.get("weight_block_size")))
        for module in modules(tensors, ".weight_scale_2"):
            codes = matrix(tensors, f"{module}.weight")
            found = {
                "codes": f"{module}.weight",
                "scale": f"{module}.weight_scale",
                "global_scale": f"{module}.weight_scale_2",
            }
            require(tensors, found["scale"], found["codes"])
            others = (f"{module}.input_scale",) if f"{module}.input_scale" in tensors else ()
            shape = (codes[0], codes[1] * 2)
            yield StoredWeight(f"{module}.weight", shape, NVFP4("multiply"), found, others=others)
