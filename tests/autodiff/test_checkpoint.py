"""Checkpointing: equal gradients, and memory that stays."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from peftarray import PeftError
from peftarray.autodiff import checkpoint, value_and_grad

LAYERS, WIDTH, ROWS = 12, 32, 256


def layer(p, x):
    hidden = np.tanh(x @ p["in"])
    return x + np.exp(-hidden * hidden) @ p["out"]


def model(one_layer):
    def loss(params, x):
        for p in params:
            x = one_layer(p, x)
        return np.mean(x * x)

    return loss


def drawn():
    random = np.random.default_rng(0)
    params = [
        {"in": random.standard_normal((WIDTH, WIDTH)) * 0.2, "out": random.standard_normal((WIDTH, WIDTH)) * 0.2}
        for _ in range(LAYERS)
    ]
    return params, random.standard_normal((ROWS, WIDTH))


def peak(function, *arguments):
    tracemalloc.start()
    result = function(*arguments)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, found


def test_memory_is_less_than_half_and_gradients_are_equal():
    params, x = drawn()
    (value, expected), whole = peak(value_and_grad(model(layer)), params, x)
    (again, found), less = peak(value_and_grad(model(checkpoint(layer))), params, x)
    assert float(value) == float(again)
    for mine, theirs in zip(found, expected, strict=True):
        for name, g in mine.items():
            np.testing.assert_array_equal(g, theirs[name])
    assert less < whole / 2


def test_trees_several_values_constants_and_nesting():
    @checkpoint
    def pair(p, x, *, twice):
        y = checkpoint(lambda a: np.sin(a))(p["a"] * x)
        return {"y": (y, y * p["b"] * (2 if twice else 1)), "constant": np.ones(3), "n": 4, "ids": np.arange(3)}

    def plain(p, x, *, twice):
        y = np.sin(p["a"] * x)
        return {"y": (y, y * p["b"] * (2 if twice else 1)), "constant": np.ones(3), "n": 4, "ids": np.arange(3)}

    def loss(function):
        def of(p):
            made = function(p, np.arange(3.0), twice=True)
            assert made["n"] == 4
            assert type(made["ids"]) is np.ndarray
            return np.sum(made["y"][1] * made["constant"]) + np.sum(made["y"][0] ** 2)

        return of

    params = {"a": np.asarray([0.1, 0.2, 0.3]), "b": np.asarray(2.0)}
    value, found = value_and_grad(loss(pair), params)
    wanted, expected = value_and_grad(loss(plain), params)
    assert float(value) == float(wanted)
    np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-15)
    np.testing.assert_allclose(found["b"], expected["b"], rtol=1e-15)


def test_a_value_that_nothing_depends_on_is_free():
    @checkpoint
    def two(x):
        return np.sin(x), np.cos(x)

    _, gradient = value_and_grad(lambda x: np.sum(two(x)[0]), np.zeros(2))
    assert gradient.tolist() == [1, 1]


def test_it_runs_on_plain_arrays():
    assert checkpoint(layer)(drawn()[0][0], drawn()[1]).shape == (ROWS, WIDTH)


def test_a_traced_array_from_around_it_is_refused():
    def loss(p):
        return np.sum(checkpoint(lambda x: x * p["w"])(p["x"]))

    with pytest.raises(PeftError, match="not among its arguments"):
        value_and_grad(loss, {"x": np.ones(2), "w": np.ones(2)})
