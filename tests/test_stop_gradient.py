"""`stop_gradient`: the same values everywhere, and a constant where a library traces."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray.arrays import namespace, stop_gradient

VALUES = np.array([1.0, -2.0, 3.0])


def test_values_and_library_stay(asarray, to_numpy):
    array = asarray(VALUES)
    assert namespace(stop_gradient(array)) is namespace(array)
    np.testing.assert_array_equal(to_numpy(stop_gradient(array)), VALUES)


def test_torch_sees_a_constant():
    torch = pytest.importorskip("torch")
    x = torch.tensor(VALUES, requires_grad=True)
    (gradient,) = torch.autograd.grad((x * stop_gradient(x)).sum(), x)
    np.testing.assert_array_equal(gradient, VALUES)


def test_jax_sees_a_constant():
    jax = pytest.importorskip("jax")
    gradient = jax.jit(jax.grad(lambda x: (x * stop_gradient(x)).sum()))(jax.numpy.asarray(VALUES))
    np.testing.assert_array_equal(gradient, VALUES)


def test_an_array_that_stands_for_others_is_asked():
    class Traced:
        def __stop_gradient__(self):
            return "constant"

    assert stop_gradient(Traced()) == "constant"
