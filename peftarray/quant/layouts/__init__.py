"""Where checkpoints keep the parts of quantised weights: names, dtypes, shapes and `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from peftarray.errors import FormatError, UnsupportedError
from peftarray.quant.codec import Codec
from peftarray.quant.layouts.bitsandbytes import BitsAndBytes
from peftarray.quant.layouts.compressed_tensors import CompressedTensors
from peftarray.quant.layouts.four_bit_floats import GptOss, ModelOpt
from peftarray.quant.layouts.fp8 import FineGrainedFP8
from peftarray.quant.layouts.layout import Header, Layout, Read, StoredWeight, WritableLayout
from peftarray.quant.layouts.packed import AWQLayout, GPTQLayout, MLXLayout

__all__ = [
    "LAYOUTS",
    "STATED",
    "Header",
    "Layout",
    "Read",
    "StoredWeight",
    "WritableLayout",
    "find_quantised",
    "layout",
    "layout_for",
    "layout_of",
    "restated",
    "writable_layout",
]

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        known.kind: known
        for known in (
            *(BitsAndBytes(), FineGrainedFP8(), CompressedTensors(), GPTQLayout(), AWQLayout()),
            *(GptOss(), ModelOpt(), MLXLayout()),
        )
    }
)
"""Every layout by what `quant_method` calls it; MLX's, which `config.json` does not name, is `mlx`."""

_SAME = {"fbgemm_fp8": "fp8"}
"""Methods whose tensors are those of another."""

STATED = ("quantization_config", "quantization", "compression_config")
"""The fields of `config.json` that say how weights are quantised."""


def layout(kind: str) -> Layout:
    """The layout of a name.

    Raises:
        UnsupportedError: it is not known.
    """
    found = LAYOUTS.get(_SAME.get(kind, kind))
    if found is None:
        message = f"the quantisation method {kind!r} is not known; known are {', '.join([*LAYOUTS, *_SAME])}"
        raise UnsupportedError(message)
    return found


def writable_layout(kind: str) -> WritableLayout:
    """The layout of a name, to write with.

    Raises:
        UnsupportedError: it is not known, or only read.
    """
    found = layout(kind)
    if not isinstance(found, WritableLayout):
        written = ", ".join(name for name, known in LAYOUTS.items() if isinstance(known, WritableLayout))
        message = f"weights quantised as {kind} are read, and not written; written are {written}"
        raise UnsupportedError(message)
    return found


def layout_of(config: Mapping[str, Any]) -> tuple[Layout, Mapping[str, Any]] | None:
    """The layout that a checkpoint's `config.json` names, and what it says of it; None where it names none.

    Raises:
        FormatError: it says something that is no object.
        UnsupportedError: it names a method that is not known.
    """
    for place in (config, config.get("text_config")):
        if not isinstance(place, Mapping):
            continue
        for key in STATED:
            stated = place.get(key)
            if stated is None:
                continue
            if not isinstance(stated, Mapping):
                message = f"{key} in config.json is {type(stated).__name__}; it must be an object"
                raise FormatError(message)
            # MLX writes the same under both names, without a method.
            return layout(str(stated.get("quant_method", "mlx"))), stated
    return None


def layout_for(codec: Codec) -> WritableLayout:
    """The first layout that writes weights of a codec.

    Raises:
        UnsupportedError: none does.
    """
    for known in LAYOUTS.values():
        if isinstance(known, WritableLayout):
            with suppress(UnsupportedError):
                known.config(codec, skipped=(), dtype="BF16")
                return known
    message = f"no layout of safetensors checkpoints is written for the codec {codec.kind}; choose another"
    raise UnsupportedError(message)


def restated(config: Mapping[str, Any], stated: Mapping[str, Any] | None) -> dict[str, Any]:
    """A `config.json` that says something else about quantisation wherever it says something; None: nothing."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in STATED:
            if stated is not None:
                found[key] = dict(stated)
        else:
            found[key] = restated(value, stated) if key == "text_config" and isinstance(value, Mapping) else value
    return found


def find_quantised(tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> dict[str, StoredWeight]:
    """The weights of a checkpoint that are stored quantised, by the names that they would have otherwise.

    Args:
        tensors: name -> header, for every tensor of the checkpoint; a `Checkpoint` is such a mapping.
        config: the whole of `config.json`; without one, bitsandbytes' weights are found all the same.
        read: a tensor by its name, such as `Checkpoint.read_stored`; asked for small ones alone.

    Raises:
        FormatError: tensors contradict each other, or two weights have one name.
        UnsupportedError: the checkpoint is quantised in a way that is not known here.
    """
    stated = layout_of(config)
    chosen, said = stated if stated is not None else (LAYOUTS["bitsandbytes"], {})
    found: dict[str, StoredWeight] = {}
    for weight in chosen.find(tensors, said, read):
        if weight.name in found or (weight.name in tensors and weight.name not in weight.names()):
            message = f"the checkpoint holds {weight.name} twice, quantised and otherwise; one of them is a leftover"
            raise FormatError(message)
        weight.check(tensors)
        found[weight.name] = weight
    return found
