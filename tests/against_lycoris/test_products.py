"""LoHa and LoKr against LyCORIS, where they come from: the same arrays under the same names make the same update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peftarray import Adapter, AdapterConfig, LoHaConfig, LoKrConfig
from peftarray.layers import Layer
from peftarray.methods.lokr import split

torch = pytest.importorskip("torch")
modules = pytest.importorskip("lycoris.modules")
factorization = pytest.importorskip("lycoris.functional").factorization

LAYERS = [torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d]
SIZES = st.integers(1, 24)
ALPHAS = st.sampled_from([0.5, 1, 3, 8])


@st.composite
def bases(draw: st.DrawFn) -> Any:
    """One of torch's layers, of any size."""
    axes = draw(st.integers(0, 3))
    kernel = () if axes == 0 else (draw(st.tuples(*[st.integers(1, 3)] * axes)),)
    return LAYERS[axes](draw(SIZES), draw(SIZES), *kernel, bias=False)


def update_of_both(config: AdapterConfig, module: Any, base: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a configuration and a module of LyCORIS make of the same drawn arrays."""
    layer = Layer("", "linear" if base.weight.ndim == 2 else "conv", tuple(base.weight.shape))
    module.double()
    theirs = dict(module.named_parameters())
    table = config.params(layer)
    assert theirs.keys() == table.keys()
    draw = np.random.default_rng(0)
    params = {}
    for name, parameter in theirs.items():
        # PEFT's core of a convolution over one axis has a last axis of length one.
        assert [n for n in parameter.shape if n != 1] == [n for n in table[name].shape if n != 1]
        params[name] = draw.standard_normal(table[name].shape)
        parameter.data = torch.asarray(params[name]).reshape(parameter.shape)
    ours = Adapter(config, layer, params).merge(np.zeros(layer.shape))
    return ours, module.get_weight(base.weight.shape).detach().numpy()


@given(base=bases(), rank=st.integers(1, 6), alpha=ALPHAS, tucker=st.booleans())
def test_loha(base, rank, alpha, tucker):
    module = modules.LohaModule("", base, lora_dim=rank, alpha=alpha, use_tucker=tucker)
    config = LoHaConfig(r=rank, alpha=alpha, use_effective_conv2d=tucker)
    ours, theirs = update_of_both(config, module, base)
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())  # its scale is a float32


@given(
    base=bases(),
    rank=st.integers(1, 6),
    alpha=ALPHAS,
    tucker=st.booleans(),
    both=st.booleans(),
    factor=st.sampled_from([-1, -1, 0, 1, 2, 3, 4]),
)
def test_lokr(base, rank, alpha, tucker, both, factor):
    shape = base.weight.shape
    # Where the factor divides a dimension and exceeds its root, LyCORIS swaps the two parts and PEFT does not.
    assume(all(split(size, factor) == factorization(size, factor) for size in shape[:2]))
    module = modules.LokrModule(
        "", base, lora_dim=rank, alpha=alpha, use_tucker=tucker, decompose_both=both, factor=factor
    )
    config = LoKrConfig(r=rank, alpha=alpha, use_effective_conv2d=tucker, decompose_both=both, decompose_factor=factor)
    ours, theirs = update_of_both(config, module, base)
    names = dict(module.named_parameters())
    if {"lokr_w1", "lokr_w2"} <= names.keys():
        theirs = theirs * (alpha / rank)  # LyCORIS has no scale where nothing is decomposed
    if base.weight.ndim == 3 and "lokr_w2" in names:
        # PEFT has the factors of this one in the other order.
        rows, columns = split(shape[0], factor), split(shape[1], factor)
        theirs = theirs.reshape(*rows, *columns, -1).transpose(1, 0, 3, 2, 4).reshape(shape)
    np.testing.assert_allclose(ours, theirs, atol=1e-12 * max(1, np.abs(theirs).max()))
