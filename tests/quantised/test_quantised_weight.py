"""What stands in for a quantised weight: products, rows and norms are those of the decoded weight, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cases import CASES

import peftarray.quantised_weight as module
from peftarray import METHODS, Adapter
from peftarray.arrays import namespace
from peftarray.backend import backend_of, load_backend
from peftarray.quant import FP8, Codec, Int8Rows, Ints, NormalFloat
from peftarray.quantised_weight import QuantisedWeight, quantised_weight
from peftarray.testing import Case

# The first is tried on every library; JAX compiles each product of each.
CODECS_TRIED = [NormalFloat(), NormalFloat(block=32, double=False), Int8Rows(), FP8(block=(8, 16)), Ints(group=32)]
SHAPE = (72, 96)
# So small that the weight takes several tiles, and the last one is shorter.
TILE = 1000


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "_TILE", TILE)
    monkeypatch.setattr(module, "_TILE_ON_HOST", TILE)


@contextmanager
def most_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Notes how many numbers every call of a codec decodes."""
    seen: list[int] = []
    decode = Codec.dequantize

    def noting(self: Codec, parts: Any, shape: Any, *, rows: Any = None) -> Any:
        begin, end = (0, shape[0]) if rows is None else rows
        seen.append((end - begin) * int(np.prod(shape[1:])))
        return decode(self, parts, shape, rows=rows)

    with monkeypatch.context() as patch:
        patch.setattr(Codec, "dequantize", noting)
        yield seen


def pair(codec: Codec, values: np.ndarray, asarray: Any) -> tuple[QuantisedWeight, np.ndarray]:
    """The weight quantised, on a library, and the float64 numbers that it then has."""
    parts = codec.quantize(values.astype(np.float32))
    known = codec.dequantize(parts, values.shape).astype(np.float64)
    return quantised_weight(codec, {name: asarray(part) for name, part in parts.items()}, values.shape), known


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("codec", CODECS_TRIED, ids=str)
def test_products_rows_and_norms(codec, xp, asarray, to_numpy, monkeypatch):
    if xp.__name__ == "jax.numpy" and codec != CODECS_TRIED[0]:
        pytest.skip("JAX compiles every product of every codec, and the first has shown that it can")
    w, known = pair(codec, drawn(SHAPE), asarray)
    x, back = asarray(drawn((2, 3, 96), 1), xp.float64), asarray(drawn((5, 72), 2), xp.float64)
    ids = asarray(np.asarray([[71, 0], [13, 13]]))
    with most_at_once(monkeypatch) as seen:
        # The adapter's namespace: a library may be one whose functions ask nobody.
        found = [x @ w.T, x[0, 0, :] @ w.mT, back @ w, namespace(w).take(w, ids, axis=0)]
        found += [namespace(w).linalg.vector_norm(side, axis=1) for side in (w, w.mT)]
    wanted = [drawn((2, 3, 96), 1) @ known.T, drawn((2, 3, 96), 1)[0, 0] @ known.T, drawn((5, 72), 2) @ known]
    wanted += [known[np.asarray([[71, 0], [13, 13]])], *(np.linalg.norm(known, axis=axis) for axis in (1, 0))]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(to_numpy(one), other, rtol=1e-5, atol=1e-5)
    assert w.materialised == 0
    assert max(seen) <= max(TILE, codec.row_step(SHAPE) * SHAPE[1]) < known.size
    assert to_numpy(w.dense()).dtype == np.float32
    assert w.materialised == 1


# Every linear layer and embedding of the table that all laws run over; the smallest weights have tiles as well.
LAYERS = [case for case in CASES if case.kind != "conv"]
ONE_EACH = list({(case.config.peft_type, case.kind): case for case in reversed(LAYERS)}.values())
# Methods that have no path on the side of the activations form the weight, and say so by the count.
FORMING: set[str] = set()


def test_the_table_has_every_method():
    assert {case.config.peft_type for case in LAYERS} == set(METHODS)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_methods_on_numpy(case, monkeypatch):
    monkeypatch.setattr(module, "_TILE_ON_HOST", 1)  # a row at a time
    check_method(case, np.asarray, np.asarray, monkeypatch)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_methods(case, asarray, to_numpy, monkeypatch):
    half = (case.shape[0] + 1) // 2 * case.shape[1]  # of two tiles: JAX compiles every one
    monkeypatch.setattr(module, "_TILE", half)
    monkeypatch.setattr(module, "_TILE_ON_HOST", half)
    check_method(case, asarray, to_numpy, monkeypatch)


def check_method(case: Case, asarray: Any, to_numpy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, merged weight and gradients are those of the method over the decoded weight, as a plain array."""
    codec = NormalFloat(block=2)
    w, known = pair(codec, case.weight(), asarray)
    w = w.counted_as(namespace(asarray(known)).float64)
    plain, params = asarray(known), {name: asarray(value) for name, value in case.params().items()}
    x, bias = asarray(case.inputs()), None if case.kind == "embedding" else asarray(np.linspace(-1, 1, case.layer.out))
    trained = {name: params[name] for name, row in case.method.params(case.layer).items() if not row.frozen}
    if case.kind != "embedding":
        trained["x"] = x
    backend = load_backend(backend_of(plain))

    def outcome(weight: Any) -> tuple[Any, dict[str, Any]]:
        def loss(values: dict[str, Any]) -> Any:
            held = {name: values.get(name, array) for name, array in params.items()}
            adapter = Adapter(case.method, case.layer, held)
            y = adapter.forward(values.get("x", x), weight, bias=bias)
            return namespace(y).sum(y * y)

        return backend.value_and_grad(loss, unused="zero", compiled=backend.COMPILES)(trained)

    with most_at_once(monkeypatch) as seen:
        found, gradients = outcome(w)
    wanted, wanted_gradients = outcome(plain)
    np.testing.assert_allclose(to_numpy(found), to_numpy(wanted), rtol=1e-9)
    for name, gradient in wanted_gradients.items():
        size = float(np.abs(to_numpy(gradient)).max(initial=1e-9))
        np.testing.assert_allclose(to_numpy(gradients[name]), to_numpy(gradient), atol=1e-8 * size, err_msg=name)
    if case.config.peft_type not in FORMING:
        assert w.materialised == 0
        assert max(seen) < known.size
    adapter = Adapter(case.method, case.layer, params)
    merged = adapter.merge(w)
    assert merged.dtype == plain.dtype
    np.testing.assert_allclose(to_numpy(merged), to_numpy(adapter.merge(plain)), atol=1e-9)
