"""Storage dtypes: what the bytes of a file mean, and how they become numbers to compute with.

Storage is not computation. A tile of any floating storage dtype is decoded to float32 (float64 stays float64), computed
there, and rounded once, to nearest even, on the way out. NumPy has no bfloat16 or float8 and its float16 arithmetic is
slow, so no formula ever sees those dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from peftarray.errors import ConfigError, UnsupportedError

__all__ = [
    "FLOATS",
    "StorageDType",
    "code_of",
    "decode",
    "dtype_name",
    "encode",
    "parse_dtype",
    "rounded",
    "storage_dtype",
]


@dataclass(frozen=True)
class StorageDType:
    """A dtype as safetensors files name it.

    Attributes:
        code: the name in a header, such as `"BF16"`.
        bits: the size of one element; below 8 for packed kinds.
        numpy: the NumPy (or ml_dtypes) dtype of the same bytes, or None where there is none.
        floating: whether a weight stored so can be decoded, computed with and encoded again.
    """

    code: str
    bits: int
    numpy: np.dtype | None
    floating: bool = False

    @property
    def compute(self) -> np.dtype:
        """The dtype that values of this storage are computed in."""
        return np.dtype(np.float64 if self.code == "F64" else np.float32)


def _table() -> dict[str, StorageDType]:
    floats = {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }
    others = {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "C64": np.complex64,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }
    packed = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    table = {
        code: StorageDType(code, np.dtype(kind).itemsize * 8, np.dtype(kind), True) for code, kind in floats.items()
    }
    table |= {code: StorageDType(code, np.dtype(kind).itemsize * 8, np.dtype(kind)) for code, kind in others.items()}
    return table | {code: StorageDType(code, bits, None) for code, bits in packed.items()}


_DTYPES = _table()
FLOATS = tuple(code for code, dtype in _DTYPES.items() if dtype.floating)
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "fp32": "F32",
    "float16": "F16",
    "fp16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def storage_dtype(code: str) -> StorageDType | None:
    """The dtype that a safetensors header names `code`, or None for one that is not known here."""
    return _DTYPES.get(code)


def code_of(dtype: np.dtype) -> str:
    """The safetensors code of a NumPy (or ml_dtypes) dtype.

    Raises:
        UnsupportedError: safetensors has none for it.
    """
    for code, known in _DTYPES.items():
        if known.numpy == dtype:
            return code
    message = f"an array of dtype {dtype} has no safetensors dtype; convert it first"
    raise UnsupportedError(message)


def dtype_name(code: str) -> str:
    """What people call a dtype: `bfloat16` for `BF16`; the code itself where there is no other name.

    Example:
        >>> dtype_name("BF16"), dtype_name("F4")
        ('bfloat16', 'F4')
    """
    known = _DTYPES.get(code)
    return code if known is None or known.numpy is None else str(known.numpy)


def parse_dtype(name: str) -> StorageDType:
    """The floating storage dtype that a user or a `config.json` calls `name` (`"bfloat16"`, `"bf16"`, `"BF16"`).

    Raises:
        ConfigError: the name is not a floating storage dtype.

    Example:
        >>> parse_dtype("bfloat16").code
        'BF16'
    """
    code = _NAMES.get(name.lower().removeprefix("torch."), name.upper())
    dtype = _DTYPES.get(code)
    if dtype is None or not dtype.floating:
        message = f"dtype is {name!r}; allowed are {', '.join(sorted(_NAMES))}"
        raise ConfigError(message)
    return dtype


def decode(stored: np.ndarray, dtype: StorageDType, out: np.ndarray | None = None) -> np.ndarray:
    """Storage values as numbers to compute with: float32, or float64 where that is what is stored.

    Args:
        stored: an array of `dtype.numpy`.
        dtype: its storage dtype.
        out: where the result goes; a new array if None. It must have the shape of `stored`.
    """
    if not dtype.floating:
        message = f"a tensor of dtype {dtype.code} is not a floating weight, so no adapter can be merged into it"
        raise UnsupportedError(message)
    if out is None:
        return stored.astype(dtype.compute)
    np.copyto(out, stored)
    return out


def encode(values: np.ndarray, dtype: StorageDType, out: np.ndarray | None = None) -> np.ndarray:
    """Numbers rounded once, to nearest even, to the values that `dtype` can store.

    Beyond its largest number float8_e4m3 has no infinity; such values saturate, where float16 and bfloat16 overflow to
    infinity (and the merge's report counts them).

    Args:
        values: a float32 or float64 array.
        dtype: the storage dtype to round to.
        out: where the result goes, an array of `dtype.numpy`; a new array if None.
    """
    if dtype.numpy is None:
        message = f"cannot encode to {dtype.code}"
        raise UnsupportedError(message)
    if values.dtype == np.float64 and dtype.bits < 32:
        return _encode_double(values, dtype, out)
    if dtype.code == "F8_E4M3":
        largest = float(ml_dtypes.finfo(dtype.numpy).max)
        values = np.where(np.isnan(values), values, np.clip(values, -largest, largest))
    result = np.empty(values.shape, dtype.numpy) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(result, values, casting="unsafe")
    return result


def rounded(values: np.ndarray, name: str) -> np.ndarray:
    """float32 values as a floating dtype of this name holds them, in float32 again.

    Example:
        >>> rounded(np.float32([1.001]), "bfloat16")
        array([1.], dtype=float32)
    """
    dtype = parse_dtype(name)
    return values if dtype.bits >= 32 else decode(encode(values, dtype), dtype)


def _encode_double(values: np.ndarray, dtype: StorageDType, out: np.ndarray | None) -> np.ndarray:
    """float64 to a short dtype with one rounding: through a float32 rounded to odd, so that no tie is made."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    inexact = single.astype(np.float64) != values
    # Round to odd: where the cast was inexact, keep the truncated value and set its last bit.
    grew = np.abs(single.astype(np.float64)) > np.abs(values)
    odd = np.where(inexact & np.isfinite(values), (bits - grew.astype(np.uint32)) | np.uint32(1), bits)
    return encode(odd.astype(np.uint32).view(np.float32), dtype, out)
