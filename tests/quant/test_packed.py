"""Packed integers: compressed-tensors by itself, GPTQ and AWQ by a reading of their layouts, number by number.

No package of GPTQ or AWQ installs without a GPU's libraries, so these two are packed and decoded here by loops over
Python's integers, from the description of their files and not from the code under test.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftarray.errors import ShapeError
from peftarray.quant import AWQ, GPTQ, Ints
from peftarray.quant.integers import pack, unpack, unpack_some

from .cases import normal

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def to_words(numbers: list[int], bits: int) -> list[int]:
    """A stream of bits, the lowest first, in signed words of 32."""
    stream = sum(number << at * bits for at, number in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    words = [stream >> 32 * at & 0xFFFFFFFF for at in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@given(st.integers(1, 8), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_words_are_streams_of_bits(bits, count, seed):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 1 << bits, (3, count)).astype(np.int32)
    words = np.array([to_words(row.tolist(), bits) for row in numbers], np.int64).astype(np.int32)
    np.testing.assert_array_equal(pack(numbers, bits), words, strict=True)
    np.testing.assert_array_equal(unpack(words, bits, count), numbers.astype(np.float32), strict=True)
    begin, end = sorted(rng.integers(0, count + 1, 2))
    np.testing.assert_array_equal(unpack_some(words, bits, begin, end), numbers[:, begin:end])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_words_on_every_library(bits, asarray, to_numpy, xp):
    numbers = np.random.default_rng(0).integers(0, 1 << bits, (2, 40)).astype(np.int32)
    words = pack(numbers, bits)
    np.testing.assert_array_equal(to_numpy(pack(asarray(numbers), bits)), words)
    np.testing.assert_array_equal(to_numpy(unpack(asarray(words), bits, 40)), numbers)


def gptq(bits: int, group: int, version: int, act_order: bool, shape: tuple[int, int]):
    """A GPTQ weight as its files hold it, and what it decodes to in float16 arithmetic, as AutoGPTQ has it."""
    rng = np.random.default_rng(bits)
    rows, columns = shape
    groups = -(-columns // (group or columns))
    numbers = rng.integers(0, 1 << bits, shape)
    zeros = rng.integers(version == 1, 1 << bits, (groups, rows))
    scales = (rng.random((groups, rows)) * 0.1 + 0.01).astype(np.float16)
    index = np.arange(columns) // (group or columns)
    if act_order:
        index = rng.permutation(index)
    parts = {
        "codes": np.array([to_words(row.tolist(), bits) for row in numbers], np.int64).astype(np.int32).T,
        "zeros": np.array([to_words((row - (version == 1)).tolist(), bits) for row in zeros], np.int64).astype(
            np.int32
        ),
        "scale": scales,
    }
    if act_order:
        parts["g_idx"] = index.astype(np.int32)
    exact = [
        [
            scales[index[column], row] * np.float16(numbers[row, column] - zeros[index[column], row])
            for column in range(columns)
        ]
        for row in range(rows)
    ]
    return parts, np.array(exact, np.float16)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 16), (4, 0), (4, 24), (8, 32)])
def test_gptq(bits, group, version, act_order, asarray, to_numpy, xp):
    if xp.__name__ == "jax.numpy" and (bits, version) != (3, 1):
        pytest.skip("JAX compiles every operation for every shape; one case will do")
    shape = (96, 64)
    how = GPTQ(bits=bits, group=group, version=version, act_order=act_order)
    parts, expected = gptq(bits, group, version, act_order, shape)
    how.check(parts, shape)
    arrays = {name: asarray(part.astype(np.float32) if name == "scale" else part) for name, part in parts.items()}
    found = to_numpy(how.dequantize(arrays, shape))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.astype(np.float16), expected)
    np.testing.assert_array_equal(to_numpy(how.dequantize(arrays, shape, rows=(5, 71))), found[5:71])


@pytest.mark.parametrize("group", [16, 0, 24])
def test_awq(group, asarray, to_numpy, xp):
    if xp.__name__ == "jax.numpy":
        pytest.skip("JAX compiles every operation for every shape; GPTQ's cases do nearly the same ones")
    rng = np.random.default_rng(0)
    rows, columns = 40, 64
    groups = -(-columns // (group or columns))
    numbers, zeros = rng.integers(0, 16, (rows, columns)), rng.integers(0, 16, (groups, rows))
    scales = (rng.random((groups, rows)) * 0.1 + 0.01).astype(np.float16)

    def packed(stack: np.ndarray) -> np.ndarray:
        words = [
            [to_words([int(line[eight * 8 + AWQ_ORDER[at]]) for at in range(8)], 4)[0] for eight in range(rows // 8)]
            for line in stack
        ]
        return np.array(words, np.int64).astype(np.int32)

    parts = {"codes": packed(numbers.T), "zeros": packed(zeros), "scale": scales}
    how = AWQ(group=group)
    how.check(parts, (rows, columns))
    index = np.arange(columns) // (group or columns)
    expected = (numbers - zeros.T[:, index]).astype(np.float16) * scales.T[:, index]
    arrays = {name: asarray(part.astype(np.float32) if name == "scale" else part) for name, part in parts.items()}
    found = to_numpy(how.dequantize(arrays, (rows, columns)))
    np.testing.assert_array_equal(found.astype(np.float16), expected)
    np.testing.assert_array_equal(to_numpy(how.dequantize(arrays, (rows, columns), rows=(3, 21))), found[3:21])


def test_layouts_that_cannot_be_are_refused():
    for how in (GPTQ(), GPTQ(bits=3), AWQ()):
        with pytest.raises(ShapeError, match="must be a matrix"):
            how.parts((36, 3, 4))
    with pytest.raises(ShapeError, match="multiple of 32 rows"):
        GPTQ(bits=3).parts((40, 64))
    with pytest.raises(ShapeError, match="multiple of 8 rows"):
        AWQ().parts((12, 64))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 32])
def test_compressed_tensors_packs_and_decodes_the_same(bits, symmetric, group):
    torch = pytest.importorskip("torch")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    size = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **size)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    weight = np.random.default_rng(bits).standard_normal((40, 64)).astype(np.float32)
    values = torch.from_numpy(weight)
    groups = values.reshape(40, -1, group or 64)
    scale, zero = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
    theirs = compressors.PackedQuantizationCompressor.compress(state, scheme)
    how = Ints(bits=bits, group=group, symmetric=symmetric)
    parts = how.quantize(weight)
    np.testing.assert_array_equal(parts["scale"], theirs["weight_scale"].numpy())
    np.testing.assert_array_equal(parts["codes"], theirs["weight_packed"].numpy(), strict=True)
    if not symmetric:
        np.testing.assert_array_equal(parts["zeros"], theirs["weight_zero_point"].numpy(), strict=True)
    back = compressors.PackedQuantizationCompressor.decompress(theirs, scheme)["weight"].numpy()
    np.testing.assert_array_equal(how.dequantize(parts, weight.shape), back)


def test_columns_of_scattered_groups():
    weight = normal((9, 64))
    how = Ints(bits=4, group=16)
    order = np.random.default_rng(0).permutation(64)
    parts = how.quantize(weight[:, order])
    codes = unpack(parts["codes"], 4, 64)
    back = np.empty_like(codes)
    back[:, order] = codes
    index = np.empty(64, np.int32)
    index[order] = np.arange(64) // 16
    scattered = {**parts, "codes": pack(back.astype(np.int32), 4), "g_idx": index}
    found = Ints(bits=4, group=16, act_order=True).dequantize(scattered, weight.shape)
    np.testing.assert_array_equal(found[:, order], how.dequantize(parts, weight.shape))
