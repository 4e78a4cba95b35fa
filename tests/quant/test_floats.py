"""Floats of eight and four bits against ml_dtypes, torch, transformers and compressed-tensors."""

from __future__ import annotations

import types

import ml_dtypes
import numpy as np
import pytest

from peftarray.dtypes import storage_dtype
from peftarray.quant import FP8, MXFP4, NVFP4
from peftarray.quant.codebooks import float8_table
from peftarray.quant.fp8 import encode_float8, largest_float8

from .cases import normal

torch = pytest.importorskip("torch")

FLOATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def bits(dtype: str) -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(storage_dtype(dtype).numpy)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pattern_means_what_it_means_elsewhere(dtype, asarray, to_numpy):
    found = to_numpy(float8_table(dtype).expand(asarray(np.arange(256, dtype=np.uint8))))
    np.testing.assert_array_equal(found, bits(dtype).astype(np.float32))
    theirs = torch.arange(256, dtype=torch.uint8).view(getattr(torch, FLOATS[dtype])).float().numpy()
    np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_of_sixteen_bits_rounds_as_elsewhere(dtype, asarray, to_numpy):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    numbers = np.concatenate([patterns.view(kind).astype(np.float32) for kind in (np.float16, ml_dtypes.bfloat16)])
    most = np.float32(largest_float8(dtype))
    numbers = numbers[np.isfinite(numbers)]
    kept = np.clip(numbers, -most, most)
    expected = kept.astype(storage_dtype(dtype).numpy).view(np.uint8)
    theirs = torch.from_numpy(kept).to(getattr(torch, FLOATS[dtype])).view(torch.uint8).numpy()
    np.testing.assert_array_equal(expected, theirs)
    np.testing.assert_array_equal(to_numpy(encode_float8(asarray(numbers), dtype)), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_go_to_the_even_code(dtype, asarray, to_numpy):
    finite = bits(dtype).astype(np.float32)
    finite = np.sort(finite[np.isfinite(finite)])
    middles = (finite[1:] + finite[:-1]) / 2
    near = [np.nextafter(middles, np.float32(-np.inf)), middles, np.nextafter(middles, np.float32(np.inf))]
    numbers = np.concatenate([finite, *near])
    expected = numbers.astype(storage_dtype(dtype).numpy).view(np.uint8)
    assert len(np.unique(expected)) == len(np.unique(finite.astype(storage_dtype(dtype).numpy).view(np.uint8)))
    np.testing.assert_array_equal(to_numpy(encode_float8(asarray(numbers), dtype)), expected)


@pytest.mark.parametrize("form", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (2, 128, 256)])
def test_blocks_are_transformers(shape, form):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = types.SimpleNamespace(weight_block_size=(128, 128), scale_fmt=form)
    quantizer = types.SimpleNamespace(quantization_config=config)
    weight = normal(shape)
    weight[..., :128, :128] = 0
    theirs = fp8.Fp8Quantize(quantizer).convert({"p.weight": torch.from_numpy(weight)})
    how = FP8(scale_dtype="F8_E8M0" if form else "F32")
    parts = how.quantize(weight)
    np.testing.assert_array_equal(parts["codes"], theirs["p.weight"].view(torch.uint8).numpy())
    scales = theirs["p.weight_scale_inv"]
    expected = scales.view(torch.uint8).numpy() if form else scales.numpy()
    filled = parts["codes"].any() & (expected != 0)
    if form is None:
        np.testing.assert_array_equal(parts["scale"], expected)
    else:
        np.testing.assert_array_equal(parts["scale"][filled], expected[filled])
    back = fp8.Fp8Dequantize(quantizer)._dequantize_one(theirs["p.weight"], scales, output_dtype=torch.float32)
    np.testing.assert_array_equal(how.dequantize(parts, shape), back.numpy())


@pytest.mark.parametrize("shape", [(300, 260), (1, 1), (129, 127)])
def test_blocks_at_the_edges_are_shorter(shape):
    weight = normal(shape)
    parts = FP8().quantize(weight)
    table = float8_table("F8_E4M3").values[:, 0]
    for row in range(parts["scale"].shape[0]):
        for column in range(parts["scale"].shape[1]):
            block = np.s_[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            expected = table[parts["codes"][block]] * parts["scale"][row, column]
            np.testing.assert_array_equal(FP8().dequantize(parts, shape)[block], expected)
            most = np.abs(weight[block]).max()
            if most > 0:
                assert parts["scale"][row, column] == pytest.approx(most / 448, rel=1e-6)


@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_scales_of_rows_and_of_the_whole_are_compressed_tensors(scale):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    strategy = {"tensor": "tensor", "row": "channel"}[scale]
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    weight = np.random.default_rng(0).standard_normal((50, 70)).astype(np.float32)
    values = torch.from_numpy(weight)
    axis = {"tensor": (0, 1), "row": (1,)}[scale]
    found, zero = helpers.calculate_qparams(values.amin(axis, keepdim=True), values.amax(axis, keepdim=True), args)
    codes = forward.quantize(values, found, zero, args, dtype=torch.float8_e4m3fn)
    how = FP8(scale=scale)
    parts = how.quantize(weight)
    np.testing.assert_array_equal(parts["scale"].reshape(-1), found.numpy().reshape(-1))
    np.testing.assert_array_equal(parts["codes"], codes.view(torch.uint8).numpy())
    np.testing.assert_array_equal(
        how.dequantize(parts, weight.shape), forward.dequantize(codes, found, zero, args).numpy()
    )


def nearest_e2m1(values: np.ndarray) -> np.ndarray:
    """The nearest number that E2M1 holds, ties to the even code; by distances, in float64."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = np.abs(np.abs(values.astype(np.float64))[..., None] - numbers)
    least = distance.min(axis=-1, keepdims=True)
    even = np.where(np.arange(8) % 2 == 0, 0, 1)
    code = np.argmin(np.where(distance == least, even, 2), axis=-1)
    return np.copysign(numbers[code], values)


def test_mxfp4_is_the_standards():
    """Section 6.3 of the standard, written down in float64."""
    weight = normal((20, 128), 3)
    weight[3] = np.tile([6, 5, 7.5, 0.25, 0.75, -1.25, 2.5, 3.5], 16)
    weight[4, ::32] = 2.0 ** np.arange(-4, 0)
    groups = weight.astype(np.float64).reshape(20, 4, 32)
    with np.errstate(divide="ignore"):
        exponent = np.frexp(np.abs(groups).max(axis=-1))[1] - 1 - 2
    exponent = np.where(np.abs(groups).max(axis=-1) == 0, -127, exponent)
    expected = nearest_e2m1(np.clip(np.ldexp(groups, -exponent[..., None]), -6, 6)) * 2.0 ** exponent[..., None]
    how = MXFP4()
    parts = how.quantize(weight)
    np.testing.assert_array_equal(parts["scale"], exponent + 127)
    np.testing.assert_array_equal(how.dequantize(parts, weight.shape), expected.reshape(weight.shape))


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_four_bits_decode_as_compressed_tensors_does(form):
    compressors = pytest.importorskip(f"compressed_tensors.compressors.{form}.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    group, strategy = {"mxfp4": (32, "group"), "nvfp4": (16, "tensor_group")}[form]
    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    weight = normal((12, 96))
    how = {"mxfp4": MXFP4(), "nvfp4": NVFP4()}[form]
    parts = how.quantize(weight)
    state = {"weight_packed": torch.from_numpy(parts["codes"]), "weight_scale": torch.from_numpy(parts["scale"])}
    if form == "nvfp4":
        state["weight_scale"] = state["weight_scale"].view(torch.float8_e4m3fn)
        state["weight_global_scale"] = torch.from_numpy(parts["global_scale"].reshape(1))
    kind = {"mxfp4": "MXFP4PackedCompressor", "nvfp4": "NVFP4PackedCompressor"}[form]
    theirs = getattr(compressors, kind).decompress(state, scheme)["weight"].float().numpy()
    ours = how.dequantize(parts, weight.shape)
    # It multiplies in bfloat16.
    np.testing.assert_allclose(ours, theirs, rtol=2**-7)
    np.testing.assert_array_equal(ours == 0, theirs == 0)


def test_nvfp4_is_quantised_as_compressed_tensors_does():
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    packing = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    args = quantization.QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    weight = normal((12, 96))
    values = torch.from_numpy(weight)
    whole = helpers.generate_gparam(values.min(), values.max())
    groups = values.unflatten(-1, (6, 16))
    scale, zero = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
    rounded = forward.quantize(values, scale, zero, args, global_scale=whole)
    codes = packing.pack_fp4_to_uint8(rounded)
    parts = NVFP4().quantize(weight)
    assert parts["global_scale"] == whole.numpy()[0]
    np.testing.assert_array_equal(parts["scale"], scale.to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    ours = NVFP4().dequantize(parts, weight.shape)
    theirs = NVFP4().dequantize(parts | {"codes": codes.numpy()}, weight.shape)
    np.testing.assert_array_equal(ours, theirs)
