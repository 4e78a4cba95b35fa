"""Checkpoints of eight-bit floats: the weight as it is called, and its scale beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, final

import ml_dtypes
import numpy as np

from peftarray.errors import FormatError
from peftarray.quant.blocks import block_count
from peftarray.quant.codebooks import float8
from peftarray.quant.codec import Codec, entries
from peftarray.quant.fp8 import FP8
from peftarray.quant.layouts.layout import Header, Read, StoredWeight, WritableLayout, require

__all__ = ["FineGrainedFP8", "find_float8"]

_FLOATS = ("F8_E4M3", "F8_E5M2")
_POWERS = ("U8", "F8_E8M0")
_SCALES = ("_scale", "_scale_inv")  # which may be such floats themselves
_BLOCK = (128, 128)


@final
class FineGrainedFP8(WritableLayout):
    """`p.weight` with `p.weight_scale_inv`, by which it is multiplied: DeepSeek-V3, Qwen3-FP8, transformers' `fp8`."""

    kind: ClassVar[str] = "fp8"
    skip_list: ClassVar[str | None] = "modules_to_not_convert"

    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterator[StoredWeight]:
        return find_float8(tensors, block_of(config.get("weight_block_size")))

    def write(
        self, name: str, shape: tuple[int, ...], codec: Codec, parts: Mapping[str, np.ndarray], *, dtype: str
    ) -> dict[str, np.ndarray]:
        if not isinstance(codec, FP8) or codec.scale != "block":
            raise self.refuse(codec)
        scale = parts["scale"]
        if codec.scale_dtype == "F8_E8M0":
            scale = scale.view(ml_dtypes.float8_e8m0fnu)
        return {name: parts["codes"].view(float8(codec.dtype)), f"{name}_scale_inv": scale}

    def config(self, codec: Codec, *, skipped: Iterable[str], dtype: str) -> dict[str, Any]:
        if not isinstance(codec, FP8) or codec.scale != "block":
            raise self.refuse(codec)
        found: dict[str, Any] = {
            "quant_method": self.kind,
            "fmt": "e4m3" if codec.dtype == "F8_E4M3" else "e5m2",
            "activation_scheme": "dynamic",
            "weight_block_size": list(codec.block),
            "modules_to_not_convert": list(skipped),
        }
        return found | ({"scale_fmt": "ue8m0"} if codec.scale_dtype == "F8_E8M0" else {})


def block_of(stated: object) -> tuple[int, int]:
    """Rows and columns of a block, as a configuration states them; 128 each where it says nothing.

    Raises:
        FormatError: it states something else.
    """
    if stated is None:
        return _BLOCK
    if isinstance(stated, list) and len(stated) == 2 and all(type(n) is int and n >= 1 for n in stated):
        return stated[0], stated[1]
    message = f"weight_block_size is {stated!r} in config.json; it must be two whole numbers of at least 1"
    raise FormatError(message)


def find_float8(tensors: Mapping[str, Header], block: tuple[int, int]) -> Iterator[StoredWeight]:
    """Every tensor of eight-bit floats, with the scale of any form beside it.

    Raises:
        FormatError: there is no scale, or one of a shape that belongs to no weight of that shape.
    """
    for name, header in tensors.items():
        if header.code not in _FLOATS or name.endswith(_SCALES):
            continue
        scale = f"{name}_scale_inv" if f"{name}_scale_inv" in tensors else f"{name}_scale"
        require(tensors, scale, name)
        shape = tuple(header.shape)
        codec = FP8(
            dtype=header.code,
            scale=_form(name, shape, tuple(tensors[scale].shape), block),
            block=block,
            scale_dtype="F8_E8M0" if tensors[scale].code in _POWERS else "F32",
        )
        # Scales of activations change nothing in a weight.
        others = tuple(other for other in _activations(name) if other in tensors)
        yield StoredWeight(name, shape, codec, {"codes": name, "scale": scale}, others=others)


def _form(name: str, shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> str:
    if entries(scale) == 1:
        return "tensor"
    rows = shape[:-1]
    if scale in (rows, (*rows, 1)):
        return "row"
    if len(shape) >= 2 and scale == (*shape[:-2], *map(block_count, shape[-2:], block)):
        return "block"
    message = (
        f"the scales of {name} have shape {scale}, and it has shape {shape}; that is no scale for the whole, for rows, "
        f"or for blocks of {block}; check weight_block_size in config.json"
    )
    raise FormatError(message)


def _activations(name: str) -> tuple[str, ...]:
    module = name.removesuffix("weight")
    return f"{module}input_scale", f"{module}activation_scale", f"{module}input_scale_ub"
