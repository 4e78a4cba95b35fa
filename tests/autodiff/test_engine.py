"""The walk back: what it frees, owns, refuses, and how deep it goes."""

from __future__ import annotations

import gc
import sys
import weakref

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftarray import PeftError
from peftarray.arrays import namespace
from peftarray.autodiff import primitive, stop_gradient, value_and_grad


def test_a_deep_graph_needs_no_recursion():
    depth = 20 * sys.getrecursionlimit()

    def loss(x):
        y = x
        for _ in range(depth):
            y = y + x * 0.0
        return y

    value, gradient = value_and_grad(loss, np.asarray(2.0))
    assert float(value) == 2.0
    assert float(gradient) == 1.0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from("+*-")), min_size=1, max_size=12))
def test_any_graph_is_differentiated_as_forward_numbers_are(steps):
    """Dual numbers, which go forwards, are the reference: values that are used many times, in any order."""
    start = [1.1, -0.7]
    values = [(x, np.eye(2)[i]) for i, x in enumerate(start)]
    for i, j, operation in steps:
        (a, da), (b, db) = values[i % len(values)], values[j % len(values)]
        values.append(
            {"+": (a + b, da + db), "-": (a - b, da - db), "*": (a * b * 0.5, (da * b + a * db) * 0.5)}[operation]
        )

    def loss(params):
        made = list(params)
        for i, j, operation in steps:
            a, b = made[i % len(made)], made[j % len(made)]
            made.append({"+": a + b, "-": a - b, "*": a * b * 0.5}[operation])
        return made[-1] + 0 * (params[0] + params[1])

    value, gradients = value_and_grad(loss, [np.asarray(x) for x in start])
    np.testing.assert_allclose(value, values[-1][0], atol=1e-12)
    np.testing.assert_allclose(gradients, values[-1][1], atol=1e-12)


def test_nothing_is_left_for_the_garbage_collector():
    kept = []

    def loss(x):
        y = np.exp(x)
        kept.append(weakref.ref(stop_gradient(y)))
        a, b = np.unstack(y @ y)
        return np.sum(np.tanh(a)) + np.sum(b)

    gc.collect()
    gc.disable()
    try:
        value_and_grad(loss, np.zeros((2, 2)))
        assert kept[0]() is None
    finally:
        gc.enable()


def test_memory_falls_during_the_walk():
    alive: list[int] = []
    saved: list[weakref.ref] = []

    @primitive
    def step(xp, needs, x):
        buffer = np.ones(10)
        saved.append(weakref.ref(buffer))

        def pull(g):
            alive.append(sum(ref() is not None for ref in saved))
            return (g * buffer,)

        return x + 1, pull

    def loss(x):
        for _ in range(8):
            x = step(x)
        return np.sum(x)

    value_and_grad(loss, np.zeros(10))
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1]


def test_frozen_arrays_cost_nothing():
    """A product with a constant on its right keeps no activation."""
    kept = []

    def loss(params):
        y = np.tanh(params["x"])
        kept.append(weakref.ref(stop_gradient(y)))
        z = (y * 1.0) @ params["w"]
        inner = y * 1.0
        kept.append(weakref.ref(stop_gradient(inner)))
        out = inner @ params["w"]
        del inner
        assert kept[1]() is None
        assert type(params["w"]) is np.ndarray
        return np.sum(z + out)

    params = {"x": np.ones((2, 3)), "w": np.ones((3, 2))}
    _, gradients = value_and_grad(loss, params, frozen=["w"])
    assert gradients["w"] is None
    assert gradients["x"].shape == (2, 3)


def test_a_gradient_that_two_share_is_not_written_to():
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(3) for _ in range(3))

    def loss(p):
        total = p["a"] + p["b"]
        return np.sum(total * total + p["b"] + p["b"] * p["c"] + p["b"] + total)

    _, found = value_and_grad(loss, {"a": a, "b": b, "c": c})
    np.testing.assert_allclose(found["a"], 2 * (a + b) + 1)
    np.testing.assert_allclose(found["b"], 2 * (a + b) + 1 + 1 + c + 1)
    np.testing.assert_allclose(found["c"], b)


def test_gradients_are_arrays_of_their_own():
    def loss(p):
        return np.sum(p["a"] + p["b"]) + np.sum(np.reshape(p["c"], (2, 2)) + p["d"]) + p["e"]

    params = {name: np.zeros(4) for name in "abc"} | {"d": np.zeros((2, 2)), "e": np.asarray(0.0)}
    _, gradients = value_and_grad(loss, params)
    for name in params:
        gradients[name] += 1
    assert {float(g.max()) for g in gradients.values()} == {2.0}
    assert all(type(g) is np.ndarray for g in gradients.values())


def test_a_tree_of_any_form_comes_back_in_it():
    params = {"layers": [{"up": np.ones(2), "down": (np.ones(1), None)}, {}], "head": np.ones(3)}

    def loss(p):
        return np.sum(p["layers"][0]["up"]) + np.sum(p["layers"][0]["down"][0]) + np.sum(p["head"] ** 2)

    _, gradients = value_and_grad(loss)(params)
    assert gradients["layers"][0]["down"][1] is None
    assert isinstance(gradients["layers"][0]["down"], tuple)
    assert gradients["layers"][1] == {}
    assert gradients["head"].tolist() == [2, 2, 2]


def test_frozen_branches_and_other_arguments():
    def loss(p, scale, *, shift):
        return np.sum(p["a"]["x"] * p["a"]["y"] * p["b"]) * scale + shift

    params = {"a": {"x": np.ones(2), "y": np.ones(2)}, "b": np.ones(2)}
    value, gradients = value_and_grad(loss, frozen=("a",))(params, 3.0, shift=1.0)
    assert float(value) == 7.0
    assert gradients["a"] == {"x": None, "y": None}
    assert gradients["b"].tolist() == [3, 3]


def test_numbers_that_numpys_arithmetic_made_scalars_are_trained_on():
    scale = np.asarray(2.0) - 0.5
    assert not isinstance(scale, np.ndarray)
    value, gradient = value_and_grad(lambda p: p["scale"] ** 2, {"scale": scale})
    assert float(value) == 2.25
    assert type(gradient["scale"]) is np.ndarray
    assert float(gradient["scale"]) == 3.0


def test_what_goes_along_is_plain():
    def loss(x):
        y = x * 2
        return np.sum(y), {"y": y, "n": 3}

    (value, aux), _ = value_and_grad(loss, np.ones(2), has_aux=True)
    assert float(value) == 4.0
    assert type(aux["y"]) is np.ndarray
    assert aux["n"] == 3


def test_unused_parameters_are_named_or_zero():
    def loss(p):
        return np.sum(p["layers"][0]["used"] * np.sign(p["layers"][1]["lost"]))

    params = {"layers": [{"used": np.ones(2)}, {"lost": np.ones(2)}]}
    with pytest.raises(PeftError, match=r"does not depend on layers\.1\.lost;"):
        value_and_grad(loss, params)
    _, gradients = value_and_grad(loss, params, unused="zero")
    assert gradients["layers"][1]["lost"].tolist() == [0, 0]


ONES = np.ones(2)
REFUSED = {
    "loss of two numbers": (lambda x: x * 2, ONES, r"the loss has shape \(2,\)"),
    "loss without parameters": (lambda x: 3.0, ONES, "the loss is a float that does not depend on params"),
    "complex loss": (lambda x: np.sum(x * 1j), ONES, "the loss is complex128"),
    "whole numbers": (lambda p: np.sum(p["i"]), {"i": np.ones(2, int)}, "i is int64, which has no gradient"),
    "Python number": (lambda p: p["s"] * 2, {"s": 1.0}, "s is a float; params holds arrays"),
    "no array": (lambda p: 1.0, {}, "params holds no array"),
    "no rule": (lambda x: np.sum(np.unique_values(x)), ONES, r"unique_values has no derivative rule"),
    "no rule for a NumPy function": (lambda x: np.sum(np.interp(x, x, x)), ONES, "interp has no derivative rule"),
    "reduce of a ufunc": (lambda x: np.add.reduce(x), ONES, r"numpy\.add\.reduce has no derivative rule"),
    "svd with all vectors": (
        lambda x: np.sum(np.linalg.svd(x)[0]),
        np.ones((2, 3)),
        "ask for full_matrices=False",
    ),
    "wide qr": (lambda x: np.sum(np.linalg.qr(x)[0]), np.ones((2, 3)), "needs m >= n"),
    "complex cholesky": (lambda x: np.sum(np.linalg.cholesky(x * 1j).real), np.eye(2), "complex matrices"),
    "into NumPy": (lambda x: np.sum(np.asarray(x)), ONES, "does not turn into a NumPy array"),
    "into NumPy within a list": (lambda x: np.sum(np.asarray([x, x])), ONES, "does not turn into a NumPy array"),
    "into a Python number": (lambda x: float(x[0]) * x[1], ONES, "does not turn into a Python number"),
    "into a truth value": (lambda x: x[0] if x[0] else x[1], ONES, "does not turn into a Python number"),
    "written to": (lambda x: x.__setitem__(0, 1.0), ONES, "not changed in place"),
    "T of three axes": (lambda x: np.sum(x.T), np.ones((2, 2, 2)), r"use x\.mT"),
    "einsum with dots": (lambda x: np.einsum("...i->", x), ONES, "write it out"),
}


@pytest.mark.parametrize(("loss", "params", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_gradient_is_refused(loss, params, message):
    with pytest.raises(PeftError, match=message):
        value_and_grad(loss, params)


def test_frozen_names_must_exist():
    with pytest.raises(PeftError, match="frozen names lora_C, which params does not have; nearest: lora_A"):
        value_and_grad(lambda p: np.sum(p["lora_A"]), {"lora_A": ONES}, frozen=["lora_C"])


def test_two_tapes_do_not_mix():
    def outer(x):
        return np.sum(x) + value_and_grad(lambda y: np.sum(y * x), np.ones(2))[0]

    with pytest.raises(PeftError, match="multiply got arrays of two different value_and_grad calls"):
        value_and_grad(outer, ONES)
    with pytest.raises(PeftError, match="traced already"):
        value_and_grad(lambda x: value_and_grad(lambda y: np.sum(y), x)[0], ONES)

    def separate(x):
        return np.sum(x * value_and_grad(lambda y: np.sum(y * stop_gradient(x)), np.ones(2))[1])

    assert value_and_grad(separate, ONES)[1].tolist() == [1, 1]


def test_a_graph_is_walked_once():
    kept = []

    def loss(x):
        kept.append(x * 2)
        return np.sum(kept[0])

    value_and_grad(loss, ONES)
    tape_of_the_leaf = kept[0].node.tape
    from peftarray.autodiff.tape import backward

    with pytest.raises(PeftError, match="taken already"):
        backward(tape_of_the_leaf.xp, [(kept[0].node, ONES)], [])


def test_a_rule_with_a_wrong_shape_is_found():
    @primitive
    def wrong(xp, needs, x):
        return np.sum(x), lambda g: (np.ones((3, 5)),)

    with pytest.raises(PeftError, match=r"a gradient of shape \(3, 5\) for a value of \(2,\)"):
        value_and_grad(wrong, ONES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_wider_gradient_is_cast_to_its_values_dtype(dtype):
    x = np.ones(3, dtype)
    _, gradient = value_and_grad(lambda v: np.sum(v * np.arange(3.0)), x)
    assert gradient.dtype == dtype


def test_a_plain_array_on_the_left_lets_the_traced_one_answer(xp, device, asarray, to_numpy):
    """Also where a library refuses strangers: there the traced array is of the library's own kind."""
    if "torch" in xp.__name__ or "jax" in xp.__name__:
        pytest.skip("has derivatives of its own")
    left = asarray(np.asarray([[1.0, 2.0], [3.0, 4.0]]))

    def loss(w):
        assert namespace(left, w) is namespace(w)
        y = left @ w + (left - w) / (left + w * w) + 2.0 * w - left * w
        keep = xp.astype(left > w, xp.float64)
        return namespace(w).sum(y * keep + 1.0 / w + 2.0**w)

    _, gradient = value_and_grad(loss, asarray(np.asarray([[0.5, 2.5], [1.5, 1.0]])))
    expected = value_and_grad_on_numpy()
    np.testing.assert_allclose(to_numpy(gradient), expected, atol=1e-12)


def value_and_grad_on_numpy():
    import torch

    left = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    w = torch.tensor([[0.5, 2.5], [1.5, 1.0]], dtype=torch.float64, requires_grad=True)
    y = left @ w + (left - w) / (left + w * w) + 2.0 * w - left * w
    (torch.sum(y * (left > w) + 1.0 / w + 2.0**w)).backward()
    return w.grad.numpy()


def test_an_operand_that_stands_for_others_answers_itself():
    class Weight:
        """Stands for `plain`, and counts who asks."""

        __namespace_rank__ = 2
        __array_ufunc__ = None

        def __init__(self, plain):
            self.plain, self.asked = plain, []

        def __rmatmul__(self, other):
            self.asked.append("operator")
            return other @ self.plain

        def __array_namespace__(self):
            return self

        def matmul(self, a, b):
            self.asked.append("function")
            return a @ self.plain

    weight = Weight(np.ones((2, 2)))

    def loss(x):
        return np.sum(x @ weight + namespace(x).matmul(x, weight))

    assert value_and_grad(loss, np.ones((1, 2)))[1].tolist() == [[4, 4]]
    assert weight.asked == ["operator", "function"]


def test_the_namespace_hands_plain_arrays_on():
    def loss(x):
        xp = namespace(x)
        assert xp.exp(ONES) is not None
        assert type(xp.matmul(ONES, ONES)) is np.float64
        assert type(xp.concat([ONES, ONES])) is np.ndarray
        assert xp.float32 is np.float32
        assert xp.pi == np.pi
        assert xp.isdtype(x.dtype, "real floating")
        assert xp.result_type(x, xp.float32) == np.float64
        assert xp.finfo(x.dtype).bits == 64
        assert type(xp.zeros_like(x)) is np.ndarray
        assert xp.argmax(x) == 0
        assert xp.linalg.matrix_rank(np.eye(2)) == 2
        assert not hasattr(xp, "no_such_function")
        assert "exp" in dir(xp)
        return xp.sum(x)

    value_and_grad(loss, ONES)


def test_attributes_of_a_traced_array():
    def loss(x):
        assert (x.shape, x.ndim, x.size, len(x)) == ((2, 3), 2, 6, 2)
        assert x.dtype == np.float64
        assert x.device == "cpu"
        assert repr(x).startswith("Traced(array(")
        assert not hasattr(x, "no_such_attribute")
        assert x.to_device("cpu").shape == x.shape
        with pytest.raises(TypeError):
            hash(x)
        assert bool((x == x).all())
        assert not bool((x != x).any())
        return x.sum()

    value_and_grad(loss, np.ones((2, 3)))


def test_a_strict_array_cannot_slip_through_its_own_library():
    """Its class is a library's, so only its missing memory keeps the library from computing without us."""

    def loss(x):
        return array_api_strict.sum(x)

    with pytest.raises(AttributeError, match="a traced array has no attribute '_array'"):
        value_and_grad(loss, array_api_strict.ones(2))
