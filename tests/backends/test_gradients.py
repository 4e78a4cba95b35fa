"""Gradients, checkpoints and compilation mean the same on every library."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from peftarray import trees
from peftarray.arrays import namespace
from peftarray.backend import backend_of, load_backend
from peftarray.errors import PeftError


@pytest.fixture(scope="module")
def backend(asarray):
    return load_backend(backend_of(asarray([1.0])))


def params():
    draw = np.random.default_rng(0)
    layers = [{"up": draw.standard_normal((5, 4)), "down": draw.standard_normal((4, 5))} for _ in range(3)]
    return {"z": layers, "bias": draw.standard_normal(5), "nothing": None, "scale": np.asarray(0.7)}


def moved(convert, tree):
    return trees.refill(tree, [leaf if leaf is None else convert(leaf) for leaf in trees.leaves(tree)])


def layer(p, x):
    return namespace(x, *p.values()).tanh(x @ p["down"].mT @ p["up"].mT)


def loss(p, x, apply=layer):
    for inner in p["z"]:
        x = apply(inner, x)
    return namespace(x, p["bias"]).mean((x * p["scale"] + p["bias"]) ** 2)


def inputs():
    return np.random.default_rng(1).standard_normal((6, 5))


def numeric(name, place, eps=1e-6):
    """The derivative by one entry, by differences of the loss on NumPy."""

    def at(shift):
        tree = params()
        leaf = dict(trees.named(tree))[name]
        leaf[place] += shift
        return float(loss(tree, inputs()))

    return (at(eps) - at(-eps)) / (2 * eps)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_derivatives(backend, asarray, to_numpy, compiled):
    if compiled and not backend.COMPILES:
        pytest.skip("it compiles only when asked to")
    value, found = backend.value_and_grad(loss, compiled=compiled)(moved(asarray, params()), asarray(inputs()))
    assert value.shape == ()
    assert float(to_numpy(value)) == pytest.approx(float(loss(params(), inputs())))
    assert [name for name, _ in trees.named(found)] == [name for name, _ in trees.named(params())]
    for name, array in trees.named(found):
        if name == "nothing":
            assert array is None
            continue
        host = to_numpy(array)
        assert type(array) is type(asarray([1.0])), name
        assert (host.dtype, host.shape) == (np.float64, dict(trees.named(params()))[name].shape)
        for place in (tuple(n // 2 for n in host.shape), tuple(n - 1 for n in host.shape)):
            assert host[place] == pytest.approx(numeric(name, place), rel=1e-5, abs=1e-9), (name, place)


def test_frozen_arrays_and_branches_have_none(backend, asarray, to_numpy):
    tree, x = moved(asarray, params()), asarray(inputs())
    _, found = backend.value_and_grad(loss, frozen=["z.0", "z.1.up", "scale"])(tree, x)
    _, everything = backend.value_and_grad(loss)(tree, x)
    frozen = {"z.0.up", "z.0.down", "z.1.up", "scale", "nothing"}
    assert {name for name, array in trees.named(found) if array is None} == frozen
    for (name, array), other in zip(trees.named(found), trees.leaves(everything), strict=True):
        if array is not None:
            np.testing.assert_allclose(to_numpy(array), to_numpy(other), rtol=1e-12, err_msg=name)


def test_float32_stays_float32(backend, asarray, to_numpy):
    tree = moved(lambda x: asarray(x.astype(np.float32)), params())
    value, found = backend.value_and_grad(loss)(tree, asarray(inputs().astype(np.float32)))
    assert {to_numpy(array).dtype for array in (value, *trees.leaves(found)) if array is not None} == {np.dtype("f4")}


def test_what_else_a_loss_gives_comes_along(backend, asarray, to_numpy):
    def with_more(p, x, *, factor):
        value = loss(p, x) * factor
        return value, {"twice": 2 * value, "x": x}

    tree, x = moved(asarray, params()), asarray(inputs())
    (value, more), _ = backend.value_and_grad(with_more, has_aux=True)(tree, x, factor=3.0)
    assert float(to_numpy(value)) == pytest.approx(3 * float(loss(params(), inputs())))
    assert float(to_numpy(more["twice"])) == pytest.approx(2 * float(to_numpy(value)))
    np.testing.assert_array_equal(to_numpy(more["x"]), inputs())


def test_any_mapping_is_a_tree(backend, asarray, to_numpy):
    tree = MappingProxyType({"w": asarray(inputs())})
    _, found = backend.value_and_grad(lambda p: namespace(p["w"]).sum(p["w"] ** 2))(tree)
    np.testing.assert_allclose(to_numpy(found["w"]), 2 * inputs())


def test_an_array_that_is_not_used_is_refused_or_has_zeros(backend, asarray, to_numpy):
    tree = {"w": asarray(inputs()), "spare": asarray(inputs())}

    def unused(p):
        return namespace(p["w"]).sum(p["w"])

    with pytest.raises(PeftError, match="the loss does not depend on spare; use them, name them in frozen"):
        backend.value_and_grad(unused)(tree)
    _, found = backend.value_and_grad(unused, unused="zero")(tree)
    assert not to_numpy(found["spare"]).any()


def test_a_checkpointed_part_is_run_again_and_gives_the_same(backend, asarray, to_numpy):
    runs = []

    def counted(p, x):
        runs.append(None)
        return layer(p, x)

    tree, x = moved(asarray, params()), asarray(inputs())
    value, found = backend.value_and_grad(lambda p, x: loss(p, x, backend.checkpoint(counted)))(tree, x)
    expected, gradients = backend.value_and_grad(loss)(tree, x)
    assert float(to_numpy(value)) == pytest.approx(float(to_numpy(expected)), rel=1e-12)
    for (name, array), other in zip(trees.named(found), trees.leaves(gradients), strict=True):
        if array is not None:
            np.testing.assert_allclose(to_numpy(array), to_numpy(other), rtol=1e-12, err_msg=name)
    if not backend.COMPILES:  # JAX traces it once and runs it again later
        assert len(runs) == 6


def test_a_compiled_function_is_the_function(backend, asarray, to_numpy):
    if not backend.COMPILES:
        pytest.skip("it compiles only when asked to")
    tree = {"b": asarray(inputs()), "a": [asarray(inputs()), 3]}
    traces = []

    def function(tree, *, factor):
        traces.append(None)
        return {"b": tree["b"] * factor, "a": (tree["a"][0] @ tree["b"].mT, tree["a"][1] + 1)}

    compiled = backend.jit(function)
    for factor in (2.0, 3.0):
        found = compiled(tree, factor=factor)
        np.testing.assert_allclose(to_numpy(found["b"]), factor * inputs())
        np.testing.assert_allclose(to_numpy(found["a"][0]), inputs() @ inputs().T, atol=1e-12)
        assert int(found["a"][1]) == 4
    assert len(traces) == 1


def test_jax_does_not_write_weights_into_its_programs(monkeypatch):
    jax = pytest.importorskip("jax")
    programs = []

    def spy(function):
        def run(*arguments):
            programs.append(jit(function).lower(*arguments).as_text())
            return jit(function)(*arguments)

        return run

    jit = jax.jit
    monkeypatch.setattr(jax, "jit", spy)
    weight = jax.numpy.asarray(np.random.default_rng(0).standard_normal((256, 256)))
    compiled = load_backend("jax").value_and_grad(lambda p, x: jax.numpy.sum((x @ weight) * p["w"]), compiled=True)
    compiled({"w": jax.numpy.ones(256)}, jax.numpy.ones((2, 256)))
    assert len(programs) == 1
    assert len(programs[0]) < 10_000


def test_torch_leaves_no_graph_behind():
    torch = pytest.importorskip("torch")
    backend = load_backend("torch")
    tree = {"w": torch.ones(3, requires_grad=True)}
    (value, more), found = backend.value_and_grad(lambda p: (p["w"].sum(), p["w"] * 2), has_aux=True)(tree)
    assert not any(array.requires_grad for array in (value, more, found["w"]))
    assert tree["w"].grad is None
    with torch.no_grad():
        backend.value_and_grad(lambda p: p["w"].sum())(tree)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda p: p["w"], "the loss has shape (6, 5); it must be one number"),
        (lambda p: 3.0, "the loss is a float that does not depend on params"),
        (lambda p: namespace(p["w"]).sum(p["v"]), "the loss does not depend on w"),
        (lambda p: namespace(p["w"]).sum(namespace(p["w"]).astype(p["w"], namespace(p["w"]).int32)), "the loss is "),
    ],
)
def test_bad_losses_are_refused(backend, asarray, function, words):
    with pytest.raises(PeftError) as caught:
        backend.value_and_grad(function)({"w": asarray(inputs()), "v": asarray(inputs())})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("make", "frozen", "words"),
    [
        (lambda asarray: {"n": asarray(np.arange(3))}, (), "which has no gradient; name it in frozen"),
        (lambda asarray: {"w": 3.0}, (), "w is a float; params holds arrays"),
        (lambda asarray: {"w": asarray([1.0])}, ("v",), "frozen names v, which params does not have"),
        (lambda asarray: {"w": asarray([1.0])}, ("w",), "params holds no array that gets a gradient"),
        (lambda asarray: {}, (), "params holds no array that gets a gradient"),
    ],
)
def test_bad_parameters_are_refused(backend, asarray, make, frozen, words):
    with pytest.raises(PeftError) as caught:
        backend.value_and_grad(lambda p: p["w"], frozen=frozen)(make(asarray))
    assert words in str(caught.value)
