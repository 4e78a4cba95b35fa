"""bitsandbytes' checkpoints: four bits with a state in JSON beside the weight, and the rows of LLM.int8."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, final

import numpy as np

from peftarray.dtypes import dtype_name, parse_dtype
from peftarray.errors import FormatError, UnsupportedError
from peftarray.quant.codec import Codec, entries
from peftarray.quant.four_bit import FourBit, FourBitFloat, NormalFloat
from peftarray.quant.int8 import Int8Rows
from peftarray.quant.layouts.layout import Header, Read, StoredWeight, WritableLayout, require
from peftarray.stores.json_file import parse_json

__all__ = ["BitsAndBytes"]

_STATE = ".quant_state.bitsandbytes__"
_KINDS: dict[str, type[FourBit]] = {kind.kind: kind for kind in (NormalFloat, FourBitFloat)}
_MOST = 1 << 16  # bytes of a state
_LONGEST = 24  # characters of a number in JSON
_ROWS = 0  # what `weight_format` says of weights that are stored as they are


@final
class BitsAndBytes(WritableLayout):
    """`p.weight` in four bits with `p.weight.absmax`, `.quant_map`, `.quant_state...`; or int8 with `p.SCB`."""

    kind: ClassVar[str] = "bitsandbytes"
    skip_list: ClassVar[str | None] = "llm_int8_skip_modules"

    def find(self, tensors: Mapping[str, Header], config: Mapping[str, Any], read: Read) -> Iterator[StoredWeight]:
        for name in tensors:
            weight, state, kind = name.partition(_STATE)
            if state:
                yield _four_bit(weight, kind, tensors, read)
            elif name.endswith(".SCB"):
                yield _rows(name.removesuffix("SCB"), tensors, read)

    def write(
        self, name: str, shape: tuple[int, ...], codec: Codec, parts: Mapping[str, np.ndarray], *, dtype: str
    ) -> dict[str, np.ndarray]:
        if isinstance(codec, Int8Rows):
            module = name.removesuffix("weight")
            return {
                name: parts["codes"],
                f"{module}SCB": parts["absmax"],
                f"{module}weight_format": np.array(_ROWS, np.uint8),
            }
        if not isinstance(codec, FourBit):
            raise self.refuse(codec)
        state: dict[str, Any] = {
            "quant_type": codec.kind,
            "blocksize": codec.block,
            "dtype": dtype_name(dtype),
            "shape": list(shape),
        }
        found = {
            name: parts["codes"].reshape(-1, 1),
            f"{name}.absmax": parts["absmax"],
            f"{name}.quant_map": codec.book.values,
        }
        if codec.double:
            found[f"{name}.nested_absmax"] = parts["nested_absmax"]
            found[f"{name}.nested_quant_map"] = parts["nested_map"]
            state |= {
                "nested_blocksize": codec.nested,
                "nested_dtype": "float32",
                "nested_offset": float(parts["nested_offset"]),
            }
        text = json.dumps(state)
        if codec.double:  # as long for every offset, so that a file can be laid out before there are numbers
            text = text.ljust(len(json.dumps(state | {"nested_offset": None})) + _LONGEST)
        found[f"{name}{_STATE}{codec.kind}"] = np.frombuffer(text.encode(), np.uint8)
        return found

    def config(self, codec: Codec, *, skipped: Iterable[str], dtype: str) -> dict[str, Any]:
        if isinstance(codec, Int8Rows):
            return {
                "quant_method": self.kind,
                "load_in_8bit": True,
                "load_in_4bit": False,
                "llm_int8_threshold": 6.0,
                "llm_int8_skip_modules": list(skipped),
            }
        if not isinstance(codec, FourBit):
            raise self.refuse(codec)
        return {
            "quant_method": self.kind,
            "load_in_8bit": False,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": codec.kind,
            "bnb_4bit_use_double_quant": codec.double,
            "bnb_4bit_compute_dtype": dtype_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(skipped),
        }


def _four_bit(weight: str, kind: str, tensors: Mapping[str, Header], read: Read) -> StoredWeight:
    state_name = f"{weight}{_STATE}{kind}"
    if kind not in _KINDS:
        message = f"{state_name} names the code {kind!r}; known are {', '.join(_KINDS)}"
        raise UnsupportedError(message)
    for name in (weight, f"{weight}.absmax", f"{weight}.quant_map"):
        require(tensors, name, state_name)
    state = _state(state_name, tensors, read)
    double = f"{weight}.nested_absmax" in tensors
    codec = _KINDS[kind](block=state["blocksize"], double=double)
    _require_map(f"{weight}.quant_map", codec.book.values, tensors, read)
    parts = {"codes": weight, "absmax": f"{weight}.absmax"}
    constants = {}
    if double:
        if state.get("nested_blocksize") != codec.nested:
            message = f"{state_name} says nested_blocksize {state.get('nested_blocksize')}; known is {codec.nested}"
            raise UnsupportedError(message)
        require(tensors, f"{weight}.nested_quant_map", state_name)
        parts |= {"nested_absmax": f"{weight}.nested_absmax", "nested_map": f"{weight}.nested_quant_map"}
        constants["nested_offset"] = np.array(state["nested_offset"], np.float32)
    return StoredWeight(
        name=weight,
        shape=tuple(state["shape"]),
        codec=codec,
        tensors=parts,
        constants=constants,
        dtype=parse_dtype(state["dtype"]).code,
        others=(f"{weight}.quant_map", state_name),
    )


def _state(name: str, tensors: Mapping[str, Header], read: Read) -> dict[str, Any]:
    """The JSON that says what the four bits mean, with what is needed in it."""
    if entries(tensors[name].shape) > _MOST:
        message = f"{name} has {entries(tensors[name].shape)} bytes; the state of a weight has {_MOST} at most"
        raise FormatError(message)
    state = parse_json(read(name).tobytes(), name)
    tests: dict[str, Callable[[Any], Any]] = {
        "blocksize": lambda value: type(value) is int and value >= 1,
        "shape": lambda value: isinstance(value, list) and value and all(type(n) is int and n >= 0 for n in value),
        "dtype": lambda value: type(value) is str,
    }
    if "nested_blocksize" in state:
        tests["nested_offset"] = lambda value: type(value) in (int, float) and math.isfinite(value)
    for key, allows in tests.items():
        if not allows(state.get(key)):
            message = f"{name} says {key} {state.get(key)!r}; that is not a {key}; the file is damaged"
            raise FormatError(message)
    return state


def _require_map(name: str, values: np.ndarray, tensors: Mapping[str, Header], read: Read) -> None:
    """That the codes stand for the numbers that they stand for here; files round them in their own way."""
    stored = read(name) if entries(tensors[name].shape) == values.size else np.zeros(0)
    if stored.size != values.size or not np.allclose(stored.reshape(-1), values, rtol=0, atol=1e-6):
        message = f"{name} maps codes to other numbers than bitsandbytes' own; such weights cannot be read here"
        raise UnsupportedError(message)


def _rows(module: str, tensors: Mapping[str, Header], read: Read) -> StoredWeight:
    weight, scale, form = f"{module}weight", f"{module}SCB", f"{module}weight_format"
    header = require(tensors, weight, scale)
    if header.code != "I8":
        message = f"{weight} has dtype {header.code} beside {scale}; it must be int8; the file is damaged"
        raise FormatError(message)
    others = (form,) if form in tensors else ()
    if others and (entries(tensors[form].shape) != 1 or int(read(form).reshape(-1)[0]) != _ROWS):
        message = f"{form} says that {weight} lies as some GPUs want it; save it again with a newer bitsandbytes"
        raise UnsupportedError(message)
    return StoredWeight(weight, tuple(header.shape), Int8Rows(), {"codes": weight, "absmax": scale}, others=others)
