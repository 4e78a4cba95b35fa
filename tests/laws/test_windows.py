"""Convolutions of any stride, padding, dilation and groups: a method's cheap path against torch's own convolution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftarray import Adapter, Window

from .cases import CASES

CONVOLUTIONS = [case for case in CASES if case.kind == "conv"]


@st.composite
def windows(draw: st.DrawFn, rank: int, out: int) -> Window:
    def each(values: st.SearchStrategy[int]) -> st.SearchStrategy[int | tuple[int, ...]]:
        return values | st.tuples(*[values] * rank)

    return Window(
        stride=draw(each(st.integers(1, 3))),
        padding=draw(each(st.integers(0, 2))),
        dilation=draw(each(st.integers(1, 2))),
        groups=draw(st.sampled_from([n for n in (1, 2, 3) if out % n == 0])),
    )


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@given(data=st.data())
def test_forward_is_the_convolution_with_the_merged_weight(case, data):
    torch = pytest.importorskip("torch")
    rank = len(case.layer.kernel)
    window = data.draw(windows(rank, case.layer.out))
    layer = replace(case.layer, window=window)
    draw = np.random.default_rng(3)
    table = case.method.params(layer)
    params = {name: draw.standard_normal(row.shape) * 0.5 for name, row in table.items() if row.stored}
    params |= case.method.derive(layer, params, layer.view(case.weight()))
    adapter = Adapter(case.method, layer, params)
    x = draw.standard_normal((2, window.groups * case.layer.shape[1], *(7 for _ in range(rank))))
    bias = draw.standard_normal(case.layer.out)
    convolve = getattr(torch.nn.functional, f"conv{rank}d")
    arrays = (x, adapter.merge(case.weight()), adapter.merge_bias(bias, case.weight()))
    wanted = convolve(*map(torch.asarray, arrays), window.stride, window.padding, window.dilation, window.groups)
    np.testing.assert_allclose(adapter.forward(x, case.weight(), bias=bias), wanted.numpy(), atol=1e-9)
