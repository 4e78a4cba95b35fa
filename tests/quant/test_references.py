"""GPTQ and AWQ decode as AutoGPTQ's and AutoAWQ's own modules do, where those packages are at hand.

    pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.9

Only the one file of each that decodes is loaded, so nothing that they depend on is needed.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from peftarray.quant.awq import AWQ
from peftarray.quant.gptq import GPTQ

torch = pytest.importorskip("torch")


def reference(package: str, file: str):
    """One file of a package, without the package."""
    found = find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    spec = spec_from_file_location(Path(file).stem, Path(found.submodule_search_locations[0]) / file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(draw, shape):
    return draw.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("fan_in", "out", "group"), [(256, 64, 64), (512, 96, 128)])
def test_gptq_is_that_of_autogptq(bits, act_order, fan_in, out, group):
    pytest.importorskip("transformers")
    layer = reference("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py").QuantLinear(
        bits, group, fan_in, out, False, weight_dtype=torch.float32
    )
    draw = np.random.default_rng(0)
    groups = np.arange(fan_in, dtype=np.int32) // group
    parts = {
        "codes": words(draw, tuple(layer.qweight.shape)),
        "zeros": words(draw, tuple(layer.qzeros.shape)),
        "scale": draw.random(tuple(layer.scales.shape), np.float32),
        "g_idx": draw.permutation(groups) if act_order else groups,
    }
    layer.qweight, layer.qzeros, layer.scales, layer.g_idx = map(torch.from_numpy, parts.values())
    expected = layer(torch.eye(fan_in)).numpy().T
    if not act_order:
        del parts["g_idx"]
    found = GPTQ(bits=bits, group=group, version=1, act_order=act_order).dequantize(parts, (out, fan_in))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("fan_in", "out", "group"), [(256, 64, 64), (512, 128, 128)])
def test_awq_is_that_of_autoawq(fan_in, out, group):
    decode = reference("awq", "utils/packing_utils.py").dequantize_gemm
    draw = np.random.default_rng(0)
    parts = {
        "codes": words(draw, (fan_in, out // 8)),
        "zeros": words(draw, (fan_in // group, out // 8)),
        "scale": draw.random((fan_in // group, out), np.float32),
    }
    expected = decode(*map(torch.from_numpy, (parts["codes"], parts["zeros"], parts["scale"])), 4, group)
    found = AWQ(group=group).dequantize(parts, (out, fan_in))
    np.testing.assert_array_equal(found, expected.numpy().T)
