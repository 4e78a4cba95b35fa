"""Storage dtypes: every bit pattern decodes as torch says, and values are rounded once, to nearest even."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from peftarray.dtypes import FLOATS, code_of, decode, encode, parse_dtype, storage_dtype
from peftarray.errors import ConfigError, UnsupportedError

SHORT = ["BF16", "F16", "F8_E4M3", "F8_E5M2"]


def every_pattern(code: str) -> np.ndarray:
    dtype = storage_dtype(code)
    return np.arange(2**dtype.bits, dtype=f"u{dtype.bits // 8}").view(dtype.numpy)


@pytest.mark.parametrize("code", SHORT)
def test_every_pattern_survives_a_round_trip(code):
    stored = every_pattern(code)
    values = decode(stored, storage_dtype(code))
    assert values.dtype == np.float32
    again = encode(values, storage_dtype(code))
    number = ~np.isnan(values) & ~(np.isinf(values) & (code == "F8_E4M3"))
    bits = f"u{stored.dtype.itemsize}"
    np.testing.assert_array_equal(again[number].view(bits), stored[number].view(bits))
    assert np.isnan(decode(again, storage_dtype(code))[np.isnan(values)]).all()


@pytest.mark.parametrize(("code", "name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F8_E5M2", "float8_e5m2")])
def test_torch_agrees_on_all_patterns_and_on_rounding(code, name):
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    stored = every_pattern(code)
    bits = f"u{stored.dtype.itemsize}"
    theirs = torch.from_numpy(stored.view(bits).copy().view(bits.replace("u", "i"))).view(dtype).float().numpy()
    np.testing.assert_array_equal(decode(stored, storage_dtype(code)), theirs)
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    rounded = torch.from_numpy(values).to(dtype).float().numpy()
    np.testing.assert_array_equal(decode(encode(values, storage_dtype(code)), storage_dtype(code)), rounded)


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_ties_go_to_even(code):
    dtype = storage_dtype(code)
    unit = float(ml_dtypes.finfo(dtype.numpy).eps)
    values = np.array([1 + 0.5 * unit, 1 + 1.5 * unit, -1 - 0.5 * unit], np.float32)
    np.testing.assert_array_equal(decode(encode(values, dtype), dtype), [1, 1 + 2 * unit, -1])


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_double_is_rounded_once(code):
    dtype = storage_dtype(code)
    unit = float(ml_dtypes.finfo(dtype.numpy).eps)
    # Just above a tie by less than float32 can tell: two roundings would go down to even.
    values = np.array([1 + 0.5 * unit + 2.0**-40, 1 + 1.5 * unit - 2.0**-40, -(1 + 0.5 * unit + 2.0**-40)])
    np.testing.assert_array_equal(decode(encode(values, dtype), dtype), [1 + unit, 1 + unit, -1 - unit])


def test_float8_saturates_and_float16_overflows():
    values = np.array([1e9, -1e9, np.nan], np.float32)
    e4m3 = decode(encode(values, storage_dtype("F8_E4M3")), storage_dtype("F8_E4M3"))
    np.testing.assert_array_equal(e4m3, [448, -448, np.nan])
    half = decode(encode(values, storage_dtype("F16")), storage_dtype("F16"))
    np.testing.assert_array_equal(half, [np.inf, -np.inf, np.nan])


def test_double_stays_double():
    values = np.array([1 + 2.0**-50])
    assert decode(encode(values, storage_dtype("F64")), storage_dtype("F64")) == values


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "BF16", "torch.bfloat16"])
def test_names_of_a_dtype(name):
    assert parse_dtype(name).code == "BF16"


@pytest.mark.parametrize("name", ["int8", "", "bfloat17"])
def test_what_is_no_floating_dtype_is_refused(name):
    with pytest.raises(ConfigError, match="allowed are"):
        parse_dtype(name)


def test_integers_are_not_decoded():
    with pytest.raises(UnsupportedError, match="not a floating weight"):
        decode(np.zeros(2, np.uint8), storage_dtype("U8"))
    with pytest.raises(UnsupportedError, match="no safetensors dtype"):
        code_of(np.dtype("datetime64[s]"))


def test_all_floats_have_a_numpy_dtype():
    assert all(storage_dtype(code).numpy is not None for code in FLOATS)
    assert storage_dtype("F4").numpy is None
    assert storage_dtype("F99") is None
