"""What stands in for a weight: every form of using it gives what the merged weight gives, and cheap ones stay cheap."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peftarray import Adapter, AdapterConfig, IA3Config, LoraConfig, OFTConfig, PeftError, VeraConfig
from peftarray.adapted_weight import adapted
from peftarray.arrays import namespace
from peftarray.autodiff import value_and_grad

Form = Callable[[Any, Any, Any, Any], Any]

METHODS = [
    LoraConfig(r=2, init_lora_weights=False),
    LoraConfig(r=2, init_lora_weights=False, use_dora=True),
    IA3Config(init_ia3_weights=False),
    VeraConfig(r=3, init_weights=False),
    OFTConfig(oft_block_size=3, init_weights=False),
]
every_method = pytest.mark.parametrize(
    "config", METHODS, ids=lambda c: c.peft_type + "-dora" * getattr(c, "use_dora", 0)
)

# Each takes the library's namespace, activations (2, 6), a weight (6, 6) and row numbers (3,).
CHEAP: dict[str, Form] = {
    "x @ w.T": lambda xp, x, w, i: x @ w.T,
    "x @ w.mT": lambda xp, x, w, i: x @ w.mT,
    "a vector": lambda xp, x, w, i: x[0, :] @ w.T,
    "a batch": lambda xp, x, w, i: xp.reshape(x, (2, 1, 6)) @ w.T,
    "w @ x": lambda xp, x, w, i: (w @ x.T).T,
    "namespace.matmul": lambda xp, x, w, i: namespace(x, w).matmul(x, w.T),
    "namespace.matrix_transpose": lambda xp, x, w, i: x @ namespace(w).matrix_transpose(w),
    "namespace.permute_dims": lambda xp, x, w, i: x @ namespace(x, w).permute_dims(w, (1, 0)),
    "namespace.tensordot": lambda xp, x, w, i: namespace(x, w).tensordot(x, w, axes=((1,), (1,))),
}
ROWS: dict[str, Form] = {
    "namespace.take": lambda xp, x, w, i: namespace(w).take(w, i, axis=0),
}
FORMED: dict[str, Form] = {
    "w + 1": lambda xp, x, w, i: w + 1,
    "x * w": lambda xp, x, w, i: x[0:1, ...] * w,
    "1 - w": lambda xp, x, w, i: 1 - w,
    "namespace.sum": lambda xp, x, w, i: namespace(w).sum(w, axis=0),
    "namespace.concat": lambda xp, x, w, i: namespace(x, w).concat([w, x], axis=0),
    "vector_norm": lambda xp, x, w, i: namespace(w).linalg.vector_norm(w, axis=1),
    "w[1:3]": lambda xp, x, w, i: w[1:3, ...],
    "wrong side": lambda xp, x, w, i: x @ w,
}
# What only NumPy and torch ask their arguments for.
ASKED: dict[str, Form] = {
    "matmul": lambda xp, x, w, i: xp.matmul(x, w.T),
    "matmul of a transpose": lambda xp, x, w, i: xp.matmul(x, xp.matrix_transpose(w)),
    "permute_dims": lambda xp, x, w, i: x @ xp.permute_dims(w, (1, 0)),
    "einsum": lambda xp, x, w, i: xp.einsum("bi,oi->bo", x, w),
    "einsum of a batch": lambda xp, x, w, i: xp.einsum("...i,oi->...o", xp.reshape(x, (2, 1, 6)), w),
    "tensordot": lambda xp, x, w, i: xp.tensordot(x, w, axes=((1,), (1,))),
}
ASKED_ROWS: dict[str, Form] = {
    "take": lambda xp, x, w, i: xp.take(w, i, axis=0),
    "w[i]": lambda xp, x, w, i: w[i],
}


def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, 6))


def inputs() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 6))


def check(form: Form, adapter: Adapter, *, formed: bool, xp: Any, asarray: Any, to_numpy: Any) -> None:
    base, x, rows = asarray(weight()), asarray(inputs()), asarray(np.asarray([3, 0, 3]))
    stand_in = adapted(adapter, base)
    found, wanted = form(xp, x, stand_in, rows), form(xp, x, adapter.merge(base), rows)
    np.testing.assert_allclose(to_numpy(found), to_numpy(wanted), atol=1e-12)
    assert (stand_in.materialised > 0) == formed


@every_method
@pytest.mark.parametrize("form", [*CHEAP, *FORMED])
def test_a_linear_weight(config, form, xp, asarray, to_numpy):
    adapter = config.init(asarray(weight()))
    check((CHEAP | FORMED)[form], adapter, formed=form in FORMED, xp=xp, asarray=asarray, to_numpy=to_numpy)


@pytest.mark.parametrize("config", [c for c in METHODS if "embedding" in c.kinds], ids=lambda c: c.peft_type)
@pytest.mark.parametrize("form", [*ROWS, *FORMED])
def test_an_embedding(config, form, xp, asarray, to_numpy):
    adapter = config.init(asarray(weight()), kind="embedding")
    check((ROWS | FORMED)[form], adapter, formed=form in FORMED, xp=xp, asarray=asarray, to_numpy=to_numpy)


@pytest.mark.parametrize("form", [*ASKED, *ASKED_ROWS])
def test_functions_of_the_library(form, xp, asarray, to_numpy):
    """NumPy and torch ask the objects that they get; JAX and the strict library raise."""
    kind = "embedding" if form in ASKED_ROWS else "linear"
    adapter = METHODS[0].init(asarray(weight()), kind=kind)
    fits = (xp.__name__.rpartition(".")[2] in ("numpy", "torch", "cupy")) and xp.__name__ != "jax.numpy"
    if fits:
        check((ASKED | ASKED_ROWS)[form], adapter, formed=False, xp=xp, asarray=asarray, to_numpy=to_numpy)
    elif form != "w[i]":
        with pytest.raises((TypeError, AttributeError)):
            (ASKED | ASKED_ROWS)[form](
                xp, asarray(inputs()), adapted(adapter, asarray(weight())), asarray(np.arange(3))
            )


def test_a_kernel_of_flax_is_stored_the_other_way(asarray, to_numpy):
    base, x = asarray(weight()), asarray(inputs())
    adapter = METHODS[0].init(base, transposed=True)
    w = adapted(adapter, base)
    np.testing.assert_allclose(to_numpy(x @ w), to_numpy(x @ adapter.merge(base)), atol=1e-12)
    assert w.materialised == 0


@pytest.mark.parametrize("traced", ["parameters", "activations", "both"])
@pytest.mark.parametrize("form", [*CHEAP, *FORMED, *ASKED])
def test_gradients_on_the_tape(form, traced):
    """Also where the model's code calls NumPy's own functions. Against torch's autograd through the merged weight."""
    torch = pytest.importorskip("torch")
    from array_api_compat import torch as torch_xp

    run = (CHEAP | FORMED | ASKED)[form]
    adapter = METHODS[0].init(weight())
    values = dict(adapter.params) if traced != "activations" else {}
    values |= {"x": inputs()} if traced != "parameters" else {}
    rows = np.arange(3)

    def loss(params: dict[str, Any]) -> Any:
        here = replace(adapter, params={name: params.get(name, array) for name, array in adapter.params.items()})
        x = params.get("x", inputs())
        y = run(np, x, adapted(here, weight()), rows)
        return np.sum(y * y) + 0.0 * np.sum(x)

    value, gradients = value_and_grad(loss, unused="zero")(values)
    leaves = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in values.items()}
    params = {name: leaves.get(name, torch.from_numpy(array.copy())) for name, array in adapter.params.items()}
    base = torch.from_numpy(weight())
    x = leaves.get("x", torch.from_numpy(inputs()))
    y = run(torch_xp, x, replace(adapter, params=params).merge(base), rows)
    wanted_value = (y * y).sum() + 0.0 * x.sum()
    wanted_value.backward()
    np.testing.assert_allclose(float(value), float(wanted_value.detach()), rtol=1e-12)
    for name, leaf in leaves.items():
        wanted = np.zeros_like(values[name]) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(gradients[name], wanted, atol=1e-10)


def test_jax_sees_through_it():
    """As an argument of a compiled function, and differentiated with respect to what it is made of: one trace."""
    jax = pytest.importorskip("jax")
    base, x = jax.numpy.asarray(weight()), jax.numpy.asarray(inputs())
    traces = []

    @jax.jit
    def loss(w: Any, x: Any) -> Any:
        traces.append(1)
        return ((x @ w.T) ** 2).sum()

    adapter = METHODS[0].init(base)
    other = replace(adapter, params={name: 2 * array for name, array in adapter.params.items()})
    for each in (adapter, other):
        np.testing.assert_allclose(loss(adapted(each, base), x), ((x @ each.merge(base).T) ** 2).sum(), rtol=1e-5)
    assert len(traces) == 1
    gradient = jax.grad(loss)(adapted(adapter, base), x)
    wanted = jax.grad(lambda p: ((x @ replace(adapter, params=p).merge(base).T) ** 2).sum())(dict(adapter.params))
    for name, array in wanted.items():
        np.testing.assert_allclose(gradient.adapter.params[name], array, rtol=1e-5, atol=1e-5)


FUNCTIONS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "linear": lambda torch, x, w, i: torch.nn.functional.linear(x, w, torch.ones(6, dtype=x.dtype)),
    "mm": lambda torch, x, w, i: torch.mm(x, w.t()),
    "addmm": lambda torch, x, w, i: torch.addmm(torch.ones(6, dtype=x.dtype), x, w.T, alpha=2.0),
    "x.matmul": lambda torch, x, w, i: x.matmul(torch.transpose(w, 0, 1)),
    "einsum of a list": lambda torch, x, w, i: torch.einsum("bi,oi->bo", [x, w]),
}


@pytest.mark.parametrize("form", FUNCTIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_functions_of_torch(form, compiled):
    torch = pytest.importorskip("torch")
    base, x = torch.from_numpy(weight()), torch.from_numpy(inputs())
    adapter = METHODS[0].init(base)
    run = lambda w: FUNCTIONS[form](torch, x, w, None)  # noqa: E731
    w = adapted(adapter, base)
    found = (
        torch.compile(lambda: run(adapted(adapter, base)), fullgraph=True, backend="eager")() if compiled else run(w)
    )
    torch.testing.assert_close(found, run(adapter.merge(base)))
    assert w.materialised == 0


def test_embeddings_and_convolutions_of_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    table, rows = torch.from_numpy(weight()), torch.tensor([[1, 2], [5, 1]])
    adapter = METHODS[0].init(table, kind="embedding")
    w = adapted(adapter, table)
    torch.testing.assert_close(functional.embedding(rows, w), functional.embedding(rows, adapter.merge(table)))
    kernel, image = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    adapter = METHODS[0].init(kernel)
    v = adapted(adapter, kernel)
    options = {"stride": 2, "padding": (1, 0), "bias": torch.ones(6, dtype=torch.float64)}
    torch.testing.assert_close(
        functional.conv2d(image, v, **options), functional.conv2d(image, adapter.merge(kernel), **options)
    )
    assert w.materialised == v.materialised == 0


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "w += 1": lambda w: w.__iadd__(1),
    "w[0] = 1": lambda w: w.__setitem__(0, 1),
    "out=w": lambda w: np.add(weight(), 1, out=w),
    "ufunc.at": lambda w: np.add.at(w, 0, 1),
    "copyto": lambda w: np.copyto(w, weight()),
    "w.fill(0)": lambda w: w.fill(0),
    "w.sort()": lambda w: w.sort(),
}


@pytest.mark.parametrize("act", IN_PLACE)
def test_nothing_changes_it_in_place(act):
    """A change of the weight that was formed for it would be lost without a word."""
    base = weight()
    w = adapted(METHODS[0].init(base), base)
    with pytest.raises((PeftError, AttributeError, TypeError)):
        IN_PLACE[act](w)
    np.testing.assert_array_equal(base, weight())


def test_torch_changes_nothing_in_place():
    torch = pytest.importorskip("torch")
    base = torch.from_numpy(weight())
    w = adapted(METHODS[0].init(base), base)
    for act in (torch.nn.init.zeros_, lambda w: torch.nn.functional.relu_(w), lambda w: w.zero_(), lambda w: w.data):
        with pytest.raises((PeftError, AttributeError)):
            act(w)
    assert torch.equal(base, torch.from_numpy(weight()))


def test_what_nobody_asks_about_is_an_error():
    torch = pytest.importorskip("torch")
    base = torch.from_numpy(weight())
    w = adapted(METHODS[0].init(base), base)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        torch.asarray(w)
    assert not isinstance(w, torch.Tensor)
    with pytest.raises(AttributeError, match="effective_weights"):
        w.data_ptr()


def test_numpy_takes_its_values():
    base = weight()
    adapter = METHODS[0].init(base)
    w = adapted(adapter, base)
    np.testing.assert_array_equal(np.asarray(w), adapter.merge(base))
    assert np.asarray(w, dtype=np.float32).dtype == np.float32
    np.testing.assert_array_equal(np.stack(list(w)), adapter.merge(base))
    assert (w.shape, w.dtype, w.ndim, w.size, len(w), w.T.shape) == ((6, 6), base.dtype, 2, 36, 6, (6, 6))


@every_method
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_short_weights_keep_their_dtype(config: AdapterConfig, library: str):
    """The product with the weight is made in its dtype, the rest in float32: near the exact result, by its rounding."""
    home = importlib.import_module({"torch": "torch", "jax": "jax.numpy"}[library])
    exact_base, exact_x = weight().astype(np.float32), inputs().astype(np.float32)
    base, x = (
        home.asarray(array).to(home.bfloat16) if library == "torch" else home.asarray(array, home.bfloat16)
        for array in (exact_base, exact_x)
    )
    adapter = config.init(base)
    assert all(array.dtype == home.float32 for array in adapter.params.values())
    y = adapter.forward(x, base)
    assert y.dtype == home.bfloat16
    wide = [array.float() if library == "torch" else array.astype(home.float32) for array in (x, base)]
    exact = adapter.forward(*wide)
    assert float(abs(exact - y).max()) <= 2**-6 * float(abs(exact).max())
