"""Fused functions: the plain formula's value and derivative, on every library and by slopes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftarray import ConfigError, PeftError, ShapeError
from peftarray.arrays import namespace, to_host
from peftarray.autodiff import fused, primitive, value_and_grad
from peftarray.autodiff.fused.bias import add_bias
from peftarray.autodiff.fused.cross_entropy import frozen_cross_entropy


class Case(NamedTuple):
    """A call of a fused function.

    Attributes:
        function: it.
        shapes: of its arguments.
        options: what else it takes.
        constants: arguments that are no parameters: name -> array.
    """

    function: Any
    shapes: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = MappingProxyType({})
    constants: tuple[np.ndarray, ...] = ()


@st.composite
def cases(draw: Any) -> Case:
    n, d = draw(st.integers(1, 5)), 2 * draw(st.integers(1, 4))
    lead = draw(st.sampled_from([(), (2,), (3, 2)]))
    name = draw(st.sampled_from(fused.__all__))
    angles = np.linspace(0, 3, n * d // 2).reshape(n, d // 2)
    targets = np.arange(n) % 4
    if n > 1:
        targets[1] = -7
    groups, per_group, more = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    q, k = (*lead, groups * per_group, n, d), (*lead, groups, n + more, d)
    masks = [(), ((n, n + more),), ((1, n, n + more),), ((groups * per_group, n, n + more),), ((n + more,),)]
    return {
        "rms_norm": Case(fused.rms_norm, ((*lead, n, d), (d,)), {"eps": 1e-3}),
        "layer_norm": Case(fused.layer_norm, ((*lead, n, d), *[(d,)] * draw(st.integers(0, 2)))),
        "silu_mul": Case(fused.silu_mul, ((*lead, n), (*lead, n))),
        "gelu": Case(fused.gelu, (lead,), {"approximate": draw(st.sampled_from(["none", "tanh"]))}),
        "softmax": Case(fused.softmax, ((*lead, n, d),), {"axis": draw(st.sampled_from([-1, -2]))}),
        "log_softmax": Case(fused.log_softmax, ((*lead, n, d),), {"axis": draw(st.sampled_from([-1, 0]))}),
        "rope": Case(fused.rope, ((*lead, n, d),), {}, (np.cos(angles), np.sin(angles))),
        "attention": Case(
            fused.attention,
            (q, k, k, *draw(st.sampled_from(masks))),
            {"causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.3]))},
        ),
        "linear_cross_entropy": Case(fused.linear_cross_entropy, ((n, d), (4, d)), {"ignore_index": -7}, (targets,)),
    }[name]


def strict(x: np.ndarray) -> Any:
    return array_api_strict.asarray(x, device=array_api_strict.Device("device1"), copy=True)


def gradients(function: Callable[..., Any], case: Case, arguments: list[Any], constants: list[Any]) -> Any:
    def loss(arrays: list[Any]) -> Any:
        xp = namespace(*arrays)
        y = function(*arrays, *constants, **case.options)
        flat = xp.reshape(y, (-1,))
        weights = xp.asarray(np.cos(1.0 + np.arange(int(np.prod(y.shape)))), device=flat.device)
        return xp.sum(flat * xp.astype(weights, flat.dtype))

    return value_and_grad(loss, arguments)


@settings(max_examples=60)
@given(cases(), st.integers(0, 2**32 - 1))
def test_a_fused_function_is_its_formula(case, seed):
    random = np.random.default_rng(seed)
    arguments = [random.standard_normal(shape) for shape in case.shapes]
    value, expected = gradients(case.function.formula, case, arguments, list(case.constants))
    for to_library in (np.asarray, strict):
        found, mine = gradients(
            case.function, case, [to_library(x) for x in arguments], [to_library(x) for x in case.constants]
        )
        np.testing.assert_allclose(to_host(found), value, rtol=1e-12, atol=1e-12)
        for g, wanted in zip(mine, expected, strict=True):
            np.testing.assert_allclose(to_host(g), wanted, rtol=1e-11, atol=1e-12)


@settings(max_examples=40)
@given(cases(), st.integers(0, 2**32 - 1))
def test_plain_arrays_of_every_library_give_the_same(case, seed):
    random = np.random.default_rng(seed)
    arguments = [random.standard_normal(shape) for shape in case.shapes]
    arguments = [*arguments, *case.constants]
    expected = case.function.formula(*arguments, **case.options)
    tensors = [torch.tensor(x, requires_grad=x.dtype.kind == "f") for x in arguments]
    followed = case.function(*tensors, **case.options)
    followed.sum().backward()
    for found in (
        case.function(*arguments, **case.options),
        case.function(*map(strict, arguments), **case.options),
        followed,
    ):
        host = found if isinstance(found, np.generic) else to_host(found)
        np.testing.assert_allclose(host, expected, rtol=1e-11, atol=1e-12)


@settings(max_examples=40)
@given(cases(), st.integers(0, 2**32 - 1))
def test_gradients_are_the_slopes(case, seed):
    random = np.random.default_rng(seed)
    arguments = [random.standard_normal(shape) for shape in case.shapes]
    ways = [random.standard_normal(shape) for shape in case.shapes]
    _, found = gradients(case.function, case, arguments, list(case.constants))
    ahead, behind = (
        gradients(
            case.function, case, [x + e * way for x, way in zip(arguments, ways, strict=True)], list(case.constants)
        )[0]
        for e in (1e-6, -1e-6)
    )
    slope = sum(np.sum(g * way) for g, way in zip(found, ways, strict=True))
    assert abs((ahead - behind) / 2e-6 - slope) < 1e-7 * (1 + sum(np.sum(np.abs(g)) for g in found))


@settings(max_examples=30)
@given(cases(), st.integers(0, 2**32 - 1))
def test_float32_stays(case, seed):
    random = np.random.default_rng(seed)
    arguments = [random.standard_normal(shape).astype(np.float32) for shape in case.shapes]
    constants = [x.astype(np.float32) if x.dtype.kind == "f" else x for x in case.constants]
    assert case.function(*arguments, *constants, **case.options).dtype == np.float32
    value, found = gradients(case.function, case, arguments, constants)
    assert value.dtype == np.float32
    assert {g.dtype for g in found} == {np.dtype(np.float32)}


def test_frozen_arguments_get_no_gradient_and_arrays_may_come_by_name():
    random = np.random.default_rng(0)
    q, k, v, mask = (random.standard_normal(s) for s in ((1, 2, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4), (3, 3)))
    params = {"mask": mask, "q": q}
    _, found = value_and_grad(lambda p: np.sum(fused.attention(p["q"], k=k, v=v, mask=p["mask"]) ** 2))(params)
    _, all_found = value_and_grad(lambda p: np.sum(fused.attention(*p) ** 2))([q, k, v, mask])
    np.testing.assert_allclose(found["q"], all_found[0], atol=1e-13)
    np.testing.assert_allclose(found["mask"], all_found[3], atol=1e-13)


def test_a_missing_argument_is_pythons_error():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        fused.attention(np.ones((1, 2, 3)), v=np.ones((1, 2, 3)))


def test_gelu_is_torchs():
    x = np.linspace(-40, 40, 20001)
    for approximate in ("none", "tanh"):
        expected = torch.nn.functional.gelu(torch.tensor(x), approximate=approximate).numpy()
        np.testing.assert_allclose(fused.gelu(x, approximate=approximate), expected, rtol=0, atol=2e-15 * 40)
        single = fused.gelu(x.astype(np.float32), approximate=approximate)
        np.testing.assert_allclose(single, expected, rtol=2e-6, atol=2e-7)


def test_large_numbers_do_not_overflow():
    x = np.asarray([-1e4, -100.0, 0.0, 100.0, 1e4], np.float32)
    np.testing.assert_allclose(fused.silu_mul(x, np.ones(5, np.float32)), [0, 0, 0, 100, 1e4], atol=1e-30)
    np.testing.assert_allclose(fused.gelu(x), [0, 0, 0, 100, 1e4], atol=1e-30)
    assert fused.softmax(x).tolist() == [0, 0, 0, 0, 1]


def test_no_array_of_all_logits_is_made():
    random = np.random.default_rng(0)
    rows, classes = 1024, 4096
    hidden, weight = random.standard_normal((rows, 8)), random.standard_normal((classes, 8))
    targets = random.integers(0, classes, rows)
    tracemalloc.start()
    value_and_grad(lambda h: fused.linear_cross_entropy(h, weight, targets), hidden)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows * classes * 8 / 3


@pytest.mark.parametrize("to_library", [np.asarray, strict])
def test_a_head_that_is_no_argument_gives_the_same(to_library):
    random, numbers = np.random.default_rng(0), np.asarray([0, 3, -100, 1, 2])
    hidden, weight = random.standard_normal((5, 3)), random.standard_normal((4, 3))
    value, wanted = value_and_grad(lambda h: fused.linear_cross_entropy(h, weight, numbers), hidden)
    head, targets = to_library(weight), to_library(numbers)
    for function in (frozen_cross_entropy, frozen_cross_entropy.formula):
        found, gradient = value_and_grad(lambda h, f=function: f(h, targets, weight=head), to_library(hidden))
        np.testing.assert_allclose(to_host(found), value, rtol=1e-12)
        np.testing.assert_allclose(to_host(gradient), wanted, atol=1e-12)


def test_a_causal_row_does_not_see_the_future():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, 5, 4)) for _ in range(3))
    later = k.copy()
    later[:, 3:] += 1
    np.testing.assert_array_equal(
        fused.attention(q, k, v, causal=True)[:, :3], fused.attention(q, later, v, causal=True)[:, :3]
    )


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_scores_of_any_size_are_weighed(size):
    random = np.random.default_rng(0)
    q, k, v = (size * random.standard_normal((2, 5, 4)) for _ in range(3))
    mask = np.where(random.random((5, 5)) < 0.4, -1e9, 0.0)
    mask[:, 2] = 0
    for case in (q, k, v), (q, k, v, mask):
        value, found = value_and_grad(lambda p: np.sum(fused.attention(*p) ** 2))(list(case))
        expected, wanted = value_and_grad(lambda p: np.sum(fused.attention.formula(*p) ** 2))(list(case))
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        for g, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(g, other, atol=1e-11 * size**3)


def test_what_makes_no_sense_is_refused():
    q, k = np.zeros((3, 2, 4)), np.zeros((2, 2, 4))
    with pytest.raises(ShapeError, match="divide the heads"):
        fused.attention(q, k, k)
    with pytest.raises(ShapeError, match="give each a key"):
        fused.attention(q, k[:1, :1], k[:1, :1], causal=True)
    with pytest.raises(ConfigError, match="'none' or 'tanh'"):
        fused.gelu(q, approximate="fast")
    with pytest.raises(PeftError, match="every target is -100"):
        fused.linear_cross_entropy(np.zeros((2, 3)), np.zeros((5, 3)), np.asarray([-100, -100]))


def test_a_bias_is_added_in_the_memory_of_the_product():
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(shape) for shape in ((5, 3), (4, 3), (4,)))
    given = x @ weight.T
    assert add_bias(given, bias) is given
    for to_library in (np.asarray, strict):
        for formula in (add_bias, add_bias.formula):
            value, found = value_and_grad(lambda p, f=formula: namespace(*p).sum(f(p[0] @ p[1].mT, p[2]) ** 2))(
                [to_library(array) for array in (x, weight, bias)]
            )
            np.testing.assert_allclose(to_host(value), ((x @ weight.T + bias) ** 2).sum(), rtol=1e-13)
            np.testing.assert_allclose(to_host(found[2]), 2 * (x @ weight.T + bias).sum(0), rtol=1e-12)


def test_an_operand_that_stands_for_an_array_takes_the_formula():
    class Weight:
        __namespace_rank__ = 2
        __array_ufunc__ = None

        def __init__(self, plain):
            self.plain = plain
            self.mT = self

        def __rmatmul__(self, other):
            return other @ self.plain.T

        def __array_namespace__(self, api_version=None):
            return np

    random = np.random.default_rng(0)
    hidden, weight, targets = random.standard_normal((3, 4)), random.standard_normal((5, 4)), np.asarray([0, 4, 2])
    _, found = value_and_grad(lambda h: fused.linear_cross_entropy(h, Weight(weight), targets), hidden)
    _, expected = value_and_grad(lambda h: fused.linear_cross_entropy(h, weight, targets), hidden)
    np.testing.assert_allclose(found, expected, atol=1e-14)

    @primitive
    def cube(xp, needs, x, w):
        return x**3, lambda g: (g, None)

    with pytest.raises(PeftError, match="cube has no formula"):
        value_and_grad(lambda x: np.sum(cube(x, Weight(weight))), hidden)
