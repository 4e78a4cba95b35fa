"""GGUF's blocks, decoded and made by the `gguf` package, which keeps up with llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from peftarray.arrays import Array, Params
from peftarray.errors import ShapeError, UnsupportedError
from peftarray.quant.blocks import finite
from peftarray.quant.codec import Codec, Part
from peftarray.settings import check_settings, one_of, setting

__all__ = ["GGUF"]

_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)


@final
@dataclass(frozen=True)
class GGUF(Codec):
    """The block types of GGUF files; NumPy arrays alone.

    Parts: `blocks` `(*shape[:-1], bytes of a row)` uint8, as the file has them.

    Attributes:
        type: the block type by its name in ggml. `quantize` makes the plain ones (`Q4_0` to `Q8_0`, `TQ1_0`, `TQ2_0`,
            `MXFP4`); `dequantize` reads all.

    Reference: ggml's documentation of the GGUF format.
    """

    type: str = setting("Q8_0", one_of(*_TYPES), doc="the block type")

    kind: ClassVar[str] = "gguf"

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        package = _package()
        block, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[self.type]]
        if not shape or shape[-1] % block:
            message = f"a weight of shape {shape} cannot be {self.type}: its last axis must be a multiple of {block}"
            raise ShapeError(message)
        return {"blocks": Part((*shape[:-1], shape[-1] // block * size), "U8")}

    def encode(self, weight: Array) -> dict[str, Array]:
        values = _of_numpy(weight).astype(np.float32)
        finite(np.abs(values))
        package = _package()
        try:
            blocks = package.quants.quantize(values, package.GGMLQuantizationType[self.type])
        except NotImplementedError:
            message = f"the gguf package makes no {self.type} blocks; it makes Q4_0 to Q8_0, TQ1_0, TQ2_0 and MXFP4"
            raise UnsupportedError(message) from None
        return {"blocks": blocks}

    def decode(self, parts: Params, shape: tuple[int, ...], begin: int, end: int) -> Array:
        package = _package()
        blocks = _of_numpy(parts["blocks"])[begin:end]
        rows = np.ascontiguousarray(blocks).reshape(-1, blocks.shape[-1])
        return package.quants.dequantize(rows, package.GGMLQuantizationType[self.type]).reshape(end - begin, *shape[1:])


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        message = "GGUF blocks need the gguf package; install it by: pip install 'peftarray[gguf]'"
        raise UnsupportedError(message) from None
    return gguf


def _of_numpy(array: Array) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        message = f"GGUF blocks are decoded by NumPy alone, and this is a {type(array).__name__}; move it to the host"
        raise UnsupportedError(message)
    return array
