"""Derivatives of every function: against torch's autograd, and against differences along a random direction."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as torch_space
import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftarray.arrays import namespace, to_host
from peftarray.autodiff import value_and_grad

from .functions import FUNCTIONS, Function

LIBRARIES = {
    "numpy": np.asarray,
    "array_api_strict": lambda x: array_api_strict.asarray(x, device=array_api_strict.Device("device1"), copy=True),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
# Machines that stop for a while are no failure.
quietly = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
few = settings(max_examples=8, **quietly)


def drawn(data: st.DataObject, function: Function, dtype: str = "float64") -> list[np.ndarray]:
    """Arguments for a function, complex at times if it takes complex numbers."""
    shapes = data.draw(function.shapes)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    is_complex = function.complex == "only" or (function.complex and data.draw(st.booleans()))
    made = []
    for shape in shapes:
        x = random.uniform(function.low, function.high, shape)
        x = x + 1j * random.uniform(function.low, function.high, shape) if is_complex else x
        made.append(
            np.asarray(x).astype(dtype if not is_complex else {"float64": "complex128", "float32": "complex64"}[dtype])
        )
    return made


def weighted(xp: Any, value: Any) -> Any:
    """One real number that depends on every entry, with another weight for each."""
    size = int(np.prod(value.shape))
    weights = xp.asarray(np.cos(1 + np.arange(size, dtype=np.float64)), device=value.device)
    flat = xp.reshape(value, (-1,))
    if "complex" in str(value.dtype):
        turned = xp.real(flat) * 0.6 + xp.imag(flat) * 0.8
    else:
        turned = flat
    return xp.sum(turned * xp.astype(weights, turned.dtype))


def on_the_tape(function: Function, arguments: list[Any]) -> tuple[Any, list[Any]]:
    def loss(arrays: list[Any]) -> Any:
        xp = namespace(*arrays)
        return weighted(xp, function.call(xp, *arrays))

    return value_and_grad(loss, arguments, unused="zero")


def on_torch(function: Function, arguments: list[np.ndarray]) -> list[np.ndarray]:
    tensors = [torch.tensor(x, requires_grad=True) for x in arguments]
    weighted(torch_space, function.call(torch_space, *tensors)).backward()
    return [(torch.zeros_like(x) if x.grad is None else x.grad).resolve_conj().numpy() for x in tensors]


def on_each_library(names: list[str]) -> pytest.MarkDecorator:
    """Functions on the libraries that have them."""
    return pytest.mark.parametrize(
        ("function", "to_library"),
        [
            pytest.param(FUNCTIONS[name], to_library, id=f"{name}-{library}")
            for name in names
            for library, to_library in LIBRARIES.items()
            if FUNCTIONS[name].standard or library == "numpy"
        ],
    )


@on_each_library([name for name, function in FUNCTIONS.items() if function.torch])
@few
@given(st.data())
def test_gradients_are_torchs(function, to_library, data):
    arguments = drawn(data, function)
    _, gradients = on_the_tape(function, [to_library(x) for x in arguments])
    for mine, theirs, x in zip(gradients, on_torch(function, arguments), arguments, strict=True):
        assert mine.shape == x.shape
        np.testing.assert_allclose(to_host(mine), theirs, rtol=1e-10, atol=1e-10)


@each_function
@few
@given(st.data())
def test_gradients_are_the_slopes(function, data):
    arguments = drawn(data, function)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ways = [
        random.standard_normal(x.shape) + (1j * random.standard_normal(x.shape) if x.dtype.kind == "c" else 0)
        for x in arguments
    ]
    _, gradients = on_the_tape(function, arguments)
    step = 1e-6
    ahead, behind = (
        on_the_tape(function, [np.asarray(x + side * step * way) for x, way in zip(arguments, ways, strict=True)])[0]
        for side in (1, -1)
    )
    slope = sum(float(np.sum((np.conj(g) * way).real)) for g, way in zip(gradients, ways, strict=True))
    scale = 1 + sum(float(np.sum(np.abs(g))) for g in gradients)
    assert abs((ahead - behind) / (2 * step) - slope) < 2e-6 * scale


@on_each_library(list(FUNCTIONS))
@settings(max_examples=2, **quietly)
@given(st.data())
def test_gradients_have_their_values_dtype(function, to_library, data):
    arguments = [to_library(x) for x in drawn(data, function, "float32")]
    value, gradients = on_the_tape(function, arguments)
    assert "float32" in str(value.dtype)
    assert [g.dtype for g in gradients] == [x.dtype for x in arguments]
    assert [str(namespace(g).__name__) for g in gradients] == [namespace(x).__name__ for x in arguments]
