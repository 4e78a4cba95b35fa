"""The laws of codecs, over all of them, on every array library."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftarray.dtypes import storage_dtype
from peftarray.errors import ConfigError, NumberError, ShapeError, UnsupportedError
from peftarray.quant import AWQ, CODECS, FP8, GPTQ, MXFP4, NormalFloat, codec, quantize_array

from .cases import ON_HOST, ON_JAX, WRITTEN, name_of, normal

CASES = [pytest.param(*case, id=f"{name_of(case[0])}-{name_of(case[1])}") for case in WRITTEN]
HOST = [pytest.param(*case, id=f"{name_of(case[0])}-{name_of(case[1])}") for case in ON_HOST]


@pytest.mark.parametrize(("how", "shape", "error"), [*CASES, *HOST])
def test_parts_are_what_they_are_said_to_be(how, shape, error):
    parts = how.quantize(normal(shape))
    said = how.parts(shape)
    assert {name: part.shape for name, part in parts.items()} == {name: part.shape for name, part in said.items()}
    assert {name: part.dtype for name, part in parts.items()} == {
        name: storage_dtype(part.dtype).numpy for name, part in said.items()
    }
    assert sum(part.nbytes for part in parts.values()) == how.nbytes(shape)


@pytest.mark.parametrize(("how", "shape", "error"), [*CASES, *HOST])
def test_what_comes_back_is_close(how, shape, error):
    weight = normal(shape)
    back = how.dequantize(how.quantize(weight), shape)
    assert back.dtype == np.float32
    assert back.shape == shape
    assert np.abs(back - weight).max() <= error * np.abs(weight).max()


@pytest.mark.parametrize(("how", "shape", "error"), [*CASES, *HOST])
def test_rows_are_a_slice_of_the_whole(how, shape, error):
    parts = how.quantize(normal(shape))
    whole = how.dequantize(parts, shape)
    step = how.row_step(shape)
    rows = {(0, 0), (0, 1), (1, 3), (shape[0] - 1, shape[0]), (shape[0] // 2, shape[0]), (shape[0], shape[0])}
    rows = {(begin, end) for begin, end in rows if begin <= end <= shape[0]}
    for begin, end in rows | {(begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step)}:
        np.testing.assert_array_equal(how.dequantize(parts, shape, rows=(begin, end)), whole[begin:end], strict=True)


@pytest.mark.parametrize(("how", "shape", "error"), [*CASES, *HOST])
@pytest.mark.parametrize("least", [1, 1 << 19])
def test_threads_change_no_bit(how, shape, error, least, monkeypatch):
    monkeypatch.setattr(sys.modules["peftarray.quant.codec"], "_LEAST", least)
    parts = how.quantize(normal(shape))
    whole = how.dequantize(parts, shape)
    for rows in ((0, shape[0]), (shape[0] // 3, shape[0] - 1)):
        if rows[0] < rows[1]:
            found = how.dequantize(parts, shape, rows=rows, threads=3)
            np.testing.assert_array_equal(found, whole[slice(*rows)], strict=True)


@pytest.mark.parametrize(("how", "shape", "error"), CASES)
def test_every_library_gives_the_same_bits(how, shape, error, asarray, to_numpy, xp):
    in_jax = xp.__name__ == "jax.numpy"
    if in_jax and (how, shape, error) not in ON_JAX:
        pytest.skip("JAX compiles every operation for every shape, for seconds; one case a family will do")
    weight = normal(shape)
    expected = how.quantize(weight)
    parts = how.quantize(asarray(weight))
    assert parts.keys() == expected.keys()
    whole = how.dequantize(expected, shape)
    if in_jax:
        # XLA divides by a reciprocal: the last bit of a scale may differ, and the code of a number on the edge, which
        # the largest of a group often is.
        back = to_numpy(how.dequantize(parts, shape))
        assert np.mean(np.abs(back - whole) > 1e-6 * np.abs(weight).max()) < 0.05
        assert np.abs(back - weight).max() <= error * np.abs(weight).max()
    else:
        for name, part in expected.items():
            np.testing.assert_array_equal(to_numpy(parts[name]), part, err_msg=name, strict=True)
    moved = {name: asarray(part) for name, part in expected.items()}
    np.testing.assert_array_equal(to_numpy(how.dequantize(moved, shape)), whole, strict=True)
    rows = (shape[0] // 3, shape[0] - 1)
    some = how.dequantize(moved, shape, rows=rows)
    np.testing.assert_array_equal(to_numpy(some), whole[slice(*rows)], strict=True)


@pytest.mark.parametrize(("how", "shape", "error"), [*CASES, *HOST])
def test_a_second_time_changes_little(how, shape, error):
    """What comes back is made of numbers that the codec can hold, up to the rounding of scales."""
    weight = normal(shape)
    once = how.dequantize(how.quantize(weight), shape)
    twice = how.dequantize(how.quantize(once), shape)
    assert np.abs(twice - once).max() <= error * np.abs(weight).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("how", "shape", "error"), [*CASES, *HOST])
def test_what_is_not_finite_is_refused(how, shape, error, bad):
    weight = normal(shape)
    weight[(-1,) * len(shape)] = bad
    with pytest.raises(NumberError, match="NaN or infinity"):
        how.quantize(weight)


@pytest.mark.parametrize(("how", "shape", "error"), [*CASES, *HOST])
def test_parts_that_do_not_fit_are_refused(how, shape, error):
    parts = how.quantize(normal(shape))
    for name in parts:
        with pytest.raises(ShapeError, match=f"lacks its part {name}"):
            how.dequantize({key: part for key, part in parts.items() if key != name}, shape)
        with pytest.raises(ShapeError, match=f"the part {name} .* it must be"):
            how.dequantize(parts | {name: np.zeros((*parts[name].shape, 2), parts[name].dtype)}, shape)
    for rows in ((-1, 1), (2, 1), (0, shape[0] + 1)):
        with pytest.raises(ShapeError, match="rows"):
            how.dequantize(parts, shape, rows=rows)


@pytest.mark.parametrize(("how", "shape", "error"), CASES)
def test_nothing_is_no_weight(how, shape, error, asarray, to_numpy, xp):
    for empty in ((), (0, *shape[1:]), (*shape[:-1], 0)):
        with pytest.raises(ShapeError):
            how.quantize(asarray(np.zeros(empty, np.float32)))
    if xp.__name__ != "jax.numpy":
        parts = {name: asarray(part) for name, part in how.quantize(normal(shape)).items()}
        none = to_numpy(how.dequantize(parts, shape, rows=(1, 1)))
        np.testing.assert_array_equal(none, np.zeros((0, *shape[1:]), np.float32), strict=True)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
@pytest.mark.parametrize(("how", "shape", "error"), [*CASES, *HOST])
def test_other_dtypes_are_rounded_to_float32_first(how, shape, error, dtype):
    kind = storage_dtype({"float16": "F16", "float64": "F64", "bfloat16": "BF16"}[dtype]).numpy
    weight = normal(shape).astype(kind)
    expected = how.quantize(weight.astype(np.float32))
    for name, part in how.quantize(weight).items():
        np.testing.assert_array_equal(part, expected[name], err_msg=name, strict=True)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.booleans(), st.integers(0, 2**32 - 1))
def test_blocks_of_any_length(rows, columns, block, double, seed):
    weight = normal((rows, columns), seed)
    how = NormalFloat(block=block, double=double)
    parts = how.quantize(weight)
    absmax = np.abs(np.pad(weight.reshape(-1), (0, -weight.size % block)).reshape(-1, block)).max(axis=1)
    codes = np.stack([parts["codes"] >> 4, parts["codes"] & 15], axis=1).reshape(-1)[: weight.size]
    if not double:
        expected = how.book.values[codes] * np.repeat(parts["absmax"], block)[: weight.size]
        np.testing.assert_array_equal(how.dequantize(parts, weight.shape), expected.reshape(weight.shape))
        np.testing.assert_allclose(parts["absmax"], absmax, atol=1e-37)
    begin, end = sorted(np.random.default_rng(seed).integers(0, rows + 1, 2))
    whole = how.dequantize(parts, weight.shape)
    np.testing.assert_array_equal(how.dequantize(parts, weight.shape, rows=(begin, end)), whole[begin:end])


def test_weights_larger_than_a_tile():
    """Tiles of the weight are whole blocks, and meet without a seam."""
    weight = normal((700, 130))
    for how in (NormalFloat(block=100), FP8(), FP8(scale="tensor"), codec("int8"), codec("int8-blocks", block=96)):
        parts = how.quantize(weight)
        whole = how.dequantize(parts, weight.shape)
        for begin in range(0, 700, 90):
            end = min(begin + 90, 700)
            np.testing.assert_array_equal(how.dequantize(parts, weight.shape, rows=(begin, end)), whole[begin:end])
        assert np.abs(whole - weight).max() < 0.2 * np.abs(weight).max()


def test_memory_maps_decode_in_place(tmp_path):
    weight = normal((64, 128))
    how = NormalFloat()
    parts = how.quantize(weight)
    mapped = {}
    for name, part in parts.items():
        part.tofile(tmp_path / name)
        mapped[name] = np.memmap(tmp_path / name, part.dtype, "r", shape=part.shape)
    expected = how.dequantize(parts, weight.shape)[10:20]
    np.testing.assert_array_equal(how.dequantize(mapped, weight.shape, rows=(10, 20)), expected)


def test_codecs_are_found_by_name():
    assert codec("nf4", block=128) == NormalFloat(block=128)
    assert set(CODECS) == {type_.kind for type_ in CODECS.values()}
    for name, kind in CODECS.items():
        assert codec(name) == kind()
        assert dataclasses.is_dataclass(kind)
    with pytest.raises(ConfigError, match=r"no codec 'nf5'; there are nf4, .*nearest: nf4"):
        codec("nf5")
    with pytest.raises(ConfigError, match="the codec nf4 has no setting 'blocks'; it has block, double"):
        codec("nf4", blocks=3)
    with pytest.raises(ConfigError, match="the codec int8 has no setting 'block'; it has none"):
        codec("int8", block=3)
    with pytest.raises(ConfigError, match=r"NormalFloat.block is 0; it must be a whole number of at least 1"):
        codec("nf4", block=0)


def test_a_weight_is_quantised_by_name():
    weight = normal((4, 64))
    how, parts = quantize_array(weight, "nf4", double=False)
    assert how == NormalFloat(double=False)
    np.testing.assert_array_equal(parts["codes"], how.quantize(weight)["codes"])


def test_what_needs_data_is_only_read():
    for how in (GPTQ(), AWQ(), codec("ints", act_order=True), codec("gguf", type="Q4_K")):
        with pytest.raises(UnsupportedError):
            how.quantize(normal((32, 256)))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="multiple of 32"):
        MXFP4().quantize(normal((2, 40)))
    with pytest.raises(ShapeError, match="two axes or more"):
        FP8().quantize(normal((40,)))
    with pytest.raises(ShapeError, match="must be a matrix"):
        codec("ints").quantize(normal((2, 3, 128)))
    with pytest.raises(ShapeError, match="no multiple of the group of 128"):
        codec("ints").quantize(normal((2, 130)))
