"""Codecs of quantised weights: array code between a weight and the parts that it is stored as, tile by tile.

`codec("nf4", block=64)` gives one by its name; `CODECS` lists them. How files name and lay out the parts is in
`peftarray.quant.layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from peftarray.arrays import Array
from peftarray.errors import ConfigError, nearest
from peftarray.quant.awq import AWQ
from peftarray.quant.codec import Codec, Part
from peftarray.quant.four_bit import FourBitFloat, NormalFloat
from peftarray.quant.fp8 import FP8
from peftarray.quant.gguf_blocks import GGUF
from peftarray.quant.gptq import GPTQ
from peftarray.quant.int8 import Int8Blocks, Int8Rows
from peftarray.quant.ints import Ints
from peftarray.quant.mlx import MLX
from peftarray.quant.mx import MXFP4, NVFP4

__all__ = [
    "AWQ",
    "CODECS",
    "FP8",
    "GGUF",
    "GPTQ",
    "MLX",
    "MXFP4",
    "NVFP4",
    "Codec",
    "FourBitFloat",
    "Int8Blocks",
    "Int8Rows",
    "Ints",
    "NormalFloat",
    "Part",
    "codec",
    "codec_of",
    "quantize_array",
]

CODECS: Mapping[str, type[Codec]] = MappingProxyType(
    {
        kind.kind: kind
        for kind in (
            *(NormalFloat, FourBitFloat, Int8Rows, Int8Blocks, FP8, MXFP4, NVFP4, Ints),
            *(GPTQ, AWQ, MLX, GGUF),
        )
    }
)
"""Every codec by its name."""


def codec(name: str, **settings: Any) -> Codec:
    """The codec of a name, with these settings and its defaults for the others.

    Raises:
        ConfigError: there is no such codec, it has no such setting, or a setting has a value that is not allowed.

    Example:
        >>> codec("nf4", block=128)
        NormalFloat(block=128, double=True)
    """
    kind = CODECS.get(name)
    if kind is None:
        message = f"there is no codec {name!r}; there are {', '.join(CODECS)}{nearest(name, CODECS)}"
        raise ConfigError(message)
    allowed = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # each is a dataclass
    for setting in settings:
        if setting not in allowed:
            words = f"it has {', '.join(allowed)}" if allowed else "it has none"
            message = f"the codec {name} has no setting {setting!r}; {words}"
            raise ConfigError(message)
    return kind(**settings)


def codec_of(given: str | Codec, **settings: Any) -> Codec:
    """A codec by its name and settings, or the one that is given.

    Raises:
        ConfigError: there is no such codec or setting, or settings come with a codec that has its own.
    """
    if isinstance(given, str):
        return codec(given, **settings)
    if settings:
        message = f"{', '.join(settings)} are given beside {given}; give them to the codec itself"
        raise ConfigError(message)
    return given


def quantize_array(weight: Array, name: str = "nf4", **settings: Any) -> tuple[Codec, dict[str, Array]]:
    """A weight of any library as the parts of a codec, and the codec that turns them back.

    Args:
        weight: floating numbers.
        name: the codec's name.
        **settings: its settings.

    Example:
        >>> import numpy as np
        >>> weight = np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)
        >>> how, parts = quantize_array(weight, "int8")
        >>> float(abs(how.dequantize(parts, weight.shape) - weight).max()) < 0.005
        True
    """
    chosen = codec(name, **settings)
    return chosen, chosen.quantize(weight)
