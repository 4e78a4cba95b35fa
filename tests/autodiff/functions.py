"""Every function with a derivative, as code against the standard, with the arguments that it is tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, mutually_broadcastable_shapes

Shapes = st.SearchStrategy[tuple[tuple[int, ...], ...]]


class Function(NamedTuple):
    """A function to differentiate.

    Attributes:
        call: `f(xp, *arrays)`, giving an array.
        shapes: what shapes its arrays may have.
        low, high: between which the numbers lie.
        complex: whether it takes complex numbers as well, or nothing else.
        torch: whether torch has it, so that its autograd is the reference.
        standard: whether the standard has it.
    """

    call: Callable[..., Any]
    shapes: Shapes
    low: float = -2.0
    high: float = 2.0
    complex: bool | str = False
    torch: bool = True
    standard: bool = True


_any = array_shapes(min_dims=0, max_dims=3, max_side=3).map(lambda shape: (shape,))
_some = array_shapes(min_dims=1, max_dims=3, max_side=4).map(lambda shape: (shape,))
_pair = mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3).map(lambda found: tuple(found.input_shapes))
_triple = mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3).map(
    lambda found: tuple(found.input_shapes)
)
_side = st.integers(1, 4)
_batch = array_shapes(min_dims=0, max_dims=2, max_side=2)


@st.composite
def _square(draw: Any, count: int = 1, smallest: int = 1) -> tuple[tuple[int, ...], ...]:
    n = draw(st.integers(smallest, 4))
    return ((*draw(_batch), n, n),) * count


@st.composite
def _tall(draw: Any) -> tuple[tuple[int, ...], ...]:
    n = draw(_side)
    return ((*draw(_batch), n + draw(st.integers(0, 2)), n),)


@st.composite
def _any_matrix(draw: Any) -> tuple[tuple[int, ...], ...]:
    return ((*draw(_batch), draw(_side), draw(_side)),)


@st.composite
def _products(draw: Any) -> tuple[tuple[int, ...], ...]:
    n, k, m = draw(_side), draw(_side), draw(_side)
    lead = draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3)).input_shapes
    left = draw(st.sampled_from([(*lead[0], n, k), (n, k), (k,)]))
    right = draw(st.sampled_from([(*lead[1], k, m), (k, m), (k,)]))
    return left, right


@st.composite
def _systems(draw: Any) -> tuple[tuple[int, ...], ...]:
    n, batch = draw(_side), draw(_batch)
    return (*batch, n, n), draw(st.sampled_from([(*batch, n, draw(_side)), (n,)]))


@st.composite
def _vectors(draw: Any) -> tuple[tuple[int, ...], ...]:
    n = draw(_side)
    return tuple((*shape, n) for shape in draw(_pair))


def _fixed(*shapes: tuple[int, ...]) -> Shapes:
    return st.just(shapes)


def _definite(xp: Any, x: Any) -> Any:
    return x @ x.mT + xp.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _symmetric(x: Any) -> Any:
    return x + x.mT


def _regular(xp: Any, x: Any) -> Any:
    return x + 5 * xp.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _separate(xp: Any, x: Any) -> Any:
    """Matrices whose singular values and eigenvalues lie apart."""
    steps = xp.astype(xp.arange(min(x.shape[-2:]), device=x.device), x.dtype) * 4 + 3
    eye = xp.eye(x.shape[-2], x.shape[-1], dtype=x.dtype, device=x.device)
    steps = steps if x.shape[-1] <= x.shape[-2] else steps[:, None]
    return x * 0.25 + eye * steps


def _index(xp: Any, like: Any, values: Any) -> Any:
    return xp.asarray(np.asarray(values), device=like.device)


def _unary(name: str, **options: Any) -> tuple[str, Function]:
    return name, Function(lambda xp, x: getattr(xp, name)(x), _any, **options)


def _binary(name: str, **options: Any) -> tuple[str, Function]:
    return name, Function(lambda xp, a, b: getattr(xp, name)(a, b), _pair, **options)


FUNCTIONS: dict[str, Function] = dict(
    [
        _unary("abs", complex=True),
        _unary("acos", low=-0.9, high=0.9),
        _unary("acosh", low=1.2, high=3),
        _unary("asin", low=-0.9, high=0.9),
        _unary("asinh"),
        _unary("atan"),
        _unary("atanh", low=-0.9, high=0.9),
        _unary("cos", complex=True),
        _unary("cosh", complex=True),
        _unary("exp", complex=True),
        _unary("expm1"),
        _unary("log", low=0.2, high=3, complex=True),
        _unary("log10", low=0.2, high=3),
        _unary("log1p", low=-0.5),
        _unary("log2", low=0.2, high=3),
        _unary("negative", complex=True),
        _unary("positive", complex=True),
        _unary("reciprocal", low=0.5, complex=True),
        _unary("sin", complex=True),
        _unary("sinh", complex=True),
        _unary("sqrt", low=0.2, complex=True),
        _unary("square", complex=True),
        _unary("tan", low=-1, high=1, complex=True),
        _unary("tanh", complex=True),
        _binary("add", complex=True),
        _binary("atan2", low=0.3),
        _binary("copysign"),
        _binary("divide", low=0.4, complex=True),
        _binary("hypot", low=0.3),
        _binary("logaddexp"),
        _binary("maximum"),
        _binary("minimum"),
        _binary("multiply", complex=True),
        _binary("pow", low=0.4),
        _binary("remainder", low=0.6),
        _binary("subtract", complex=True),
    ]
)
FUNCTIONS |= {
    "conj": Function(lambda xp, x: xp.conj(x) * (1 + 2j), _any, complex=True),
    "real": Function(lambda xp, x: xp.real(x * (1 + 2j)), _any, complex=True),
    "imag": Function(lambda xp, x: xp.imag(x * (1 + 2j)), _any, complex=True),
    "operators": Function(lambda xp, a, b: -(2.0 * a + b / 2 - 1) * (3 - b) + abs(a) - (+b) + 1.5 / (a * a + 1), _pair),
    "power of two": Function(lambda xp, x: x**2 + x**0, _any, complex=True),
    "power of three": Function(lambda xp, x: x**3 + 2.0**x + x**1.0, _any),
    "modulo": Function(lambda xp, a: a % 0.7, _any, low=0.1),
    "clip": Function(lambda xp, x: xp.clip(x, -1.0, 0.5) + xp.clip(x, max=1.0) + xp.clip(x, min=-1.5), _any),
    "clip at arrays": Function(lambda xp, x, a, b: xp.clip(x, min=a, max=a + xp.abs(b)), _triple, torch=False),
    "where": Function(lambda xp, a, b: xp.where(a > 0, a * b, b) + xp.where(b > 0, a, 1.0), _pair),
    "constants of the gradient": Function(
        lambda xp, x: x * (xp.floor(x) + xp.ceil(x) + xp.sign(x) + xp.round(x) + xp.trunc(x)), _any
    ),
    "floor_divide": Function(lambda xp, x: (x // 1.0 + xp.floor_divide(x, 0.7)) * x, _any, torch=False),
    "comparisons": Function(
        lambda xp, a, b: a * xp.astype((a < b) | (a >= 0.5), a.dtype) + b * xp.astype(xp.isfinite(b), b.dtype), _pair
    ),
    # Reductions.
    "sum": Function(lambda xp, x: xp.sum(x, axis=0) * xp.sum(x), _some, complex=True),
    "sum, kept": Function(lambda xp, x: x * xp.sum(x, axis=-1, keepdims=True), _some, complex=True),
    "sum of axes": Function(lambda xp, x: xp.sum(x, axis=(0, -1)), _fixed((2, 3, 4))),
    "mean": Function(lambda xp, x: x - xp.mean(x, axis=-1, keepdims=True) + xp.mean(x), _some),
    "var": Function(lambda xp, x: xp.var(x, axis=-1) + xp.var(x, correction=0.5), _some),
    "std": Function(lambda xp, x: xp.std(x, axis=0, correction=1, keepdims=True), _fixed((3, 2))),
    "max": Function(lambda xp, x: xp.max(x, axis=-1) * xp.max(x), _some),
    "min": Function(lambda xp, x: xp.min(x, axis=0, keepdims=True) + xp.min(x), _some),
    "prod": Function(lambda xp, x: xp.prod(x, axis=-1) + xp.prod(x), _some),
    "prod of axes": Function(lambda xp, x: xp.prod(x, axis=(0, 2)), _fixed((2, 3, 2)), torch=False),
    "prod with a zero": Function(
        lambda xp, x: xp.prod(xp.where(x < 0.5, 0.0, x - 0.5), axis=-1), _fixed((6, 3)), low=0.4
    ),
    "cumulative_sum": Function(lambda xp, x: xp.cumulative_sum(x, axis=-1), _some),
    "cumulative_sum, from zero": Function(
        lambda xp, x: xp.cumulative_sum(x, axis=0, include_initial=True), _fixed((3, 2)), torch=False
    ),
    "diff": Function(lambda xp, x: xp.diff(x, axis=0, n=2), _fixed((4, 2)), torch=False),
    "sort": Function(lambda xp, x: xp.sort(x, axis=-1, descending=True), _some),
    "logsumexp": Function(
        lambda xp, x: xp.log(xp.sum(xp.exp(x - xp.max(x, axis=-1, keepdims=True)), axis=-1)) + xp.max(x, axis=-1), _some
    ),
    # Shapes.
    "reshape": Function(lambda xp, x: xp.reshape(x, (-1,)), _any, complex=True),
    "permute_dims": Function(lambda xp, x: xp.permute_dims(x, (2, 0, 1)), _fixed((2, 3, 4))),
    "moveaxis": Function(
        lambda xp, x: xp.moveaxis(x, (0, 2), (-1, 0)) + xp.moveaxis(x, 0, -1)[0, ...], _fixed((4, 4, 4))
    ),
    "transposes": Function(lambda xp, x: x.mT @ x + xp.matrix_transpose(x) @ x, _any_matrix(), complex=True),
    "T": Function(lambda xp, x: x.T, _fixed((2, 3))),
    "concat": Function(lambda xp, a, b: xp.concat([a, b, a], axis=1), _fixed((2, 3), (2, 2))),
    "concat, flat": Function(lambda xp, a, b: xp.concat([a, b], axis=None), _pair),
    "stack": Function(lambda xp, a, b: xp.stack([a, b], axis=-1), _fixed((2, 3), (2, 3))),
    "unstack": Function(lambda xp, x: xp.unstack(x)[0] * xp.unstack(x)[-1], _fixed((3, 2)), complex=True),
    "unpacking": Function(lambda xp, x: (lambda a, b, c: a * b - c)(*x), _fixed((3, 2))),
    "expand_dims": Function(lambda xp, x: xp.expand_dims(x, axis=-1) * x, _fixed((3,))),
    "squeeze": Function(lambda xp, x: xp.squeeze(x, axis=(0, 2)), _fixed((1, 3, 1))),
    "broadcast_to": Function(lambda xp, x: xp.broadcast_to(x, (2, 3, 4)), _fixed((3, 1))),
    "broadcast_arrays": Function(lambda xp, a, b: xp.broadcast_arrays(a, b)[0] * 2, _pair),
    "meshgrid": Function(lambda xp, a, b: xp.meshgrid(a, b)[0] * xp.meshgrid(a, b)[1], _fixed((2,), (3,))),
    "flip": Function(lambda xp, x: xp.flip(x) + xp.flip(x, axis=-1) * 2, _some),
    "roll": Function(lambda xp, x: xp.roll(x, 1) + xp.roll(x, (1, -2), axis=(0, 1)) * 2, _fixed((3, 4))),
    "repeat": Function(lambda xp, x: xp.repeat(x, 3, axis=1), _fixed((2, 3))),
    "repeat, unevenly": Function(lambda xp, x: xp.repeat(x, _index(xp, x, [2, 0, 1]), axis=1), _fixed((2, 3))),
    "tile": Function(lambda xp, x: xp.tile(x, (2, 1, 3)), _fixed((2, 3))),
    "tril, triu": Function(lambda xp, x: xp.tril(x, k=-1) + xp.triu(x) * 2, _any_matrix()),
    "asarray": Function(lambda xp, x: xp.asarray(x) * xp.astype(x, x.dtype) + xp.ones_like(x), _any, torch=False),
    "full": Function(lambda xp, x: xp.full_like(x, 2.0) * x, _any),
    # Indices.
    "slices": Function(lambda xp, x: x[1:, ::2, ...] * x[0, 0, None, None, 1], _fixed((3, 4, 2))),
    "backwards": Function(lambda xp, x: x[..., ::-2] * x[-1, ..., -1], _fixed((3, 4)), torch=False),
    "rows by numbers": Function(lambda xp, x: x[_index(xp, x, [[2, -1], [0, 2]])], _fixed((3, 2)), standard=False),
    "columns by numbers": Function(lambda xp, x: x[:, _index(xp, x, [1, 1, -1])], _fixed((2, 3)), standard=False),
    "entries by numbers": Function(lambda xp, x: x[_index(xp, x, [0, 1, 1]), _index(xp, x, [2, 0, 0])], _fixed((2, 3))),
    "mask": Function(lambda xp, x: x[_index(xp, x, [[True, False, True], [False, True, True]])], _fixed((2, 3))),
    "take": Function(lambda xp, x: xp.take(x, _index(xp, x, [2, 0, 2, -1]), axis=1), _fixed((2, 3, 2))),
    "take_along_axis": Function(
        lambda xp, x: xp.take_along_axis(x, _index(xp, x, [[2, 0, 2], [1, 1, 0]]), axis=-1), _fixed((2, 3))
    ),
    # Products.
    "matmul": Function(lambda xp, a, b: a @ b + xp.matmul(a, b), _products(), complex=True),
    "vecdot": Function(lambda xp, a, b: xp.vecdot(a, b), _vectors(), complex=True),
    "vecdot, axis": Function(lambda xp, a, b: xp.vecdot(a, b, axis=-2), _fixed((3, 2), (4, 3, 2))),
    "tensordot": Function(
        lambda xp, a, b: xp.tensordot(a, b, axes=((0, 2), (1, 0))) + xp.tensordot(a, b, axes=0)[0, :, 0, 0, 0, :],
        _fixed((2, 3, 4), (4, 2, 5)),
    ),
    "outer": Function(lambda xp, a, b: xp.linalg.outer(a, b), _fixed((2,), (3,)), complex=True),
    # Linear algebra.
    "inv": Function(lambda xp, x: xp.linalg.inv(_regular(xp, x)), _square(), complex=True),
    "solve": Function(lambda xp, a, b: xp.linalg.solve(_regular(xp, a), b), _systems(), complex=True),
    "det": Function(lambda xp, x: xp.linalg.det(_regular(xp, x)), _square(), complex=True),
    "slogdet": Function(lambda xp, x: xp.linalg.slogdet(_regular(xp, x))[1], _square()),
    "cholesky": Function(lambda xp, x: xp.linalg.cholesky(_definite(xp, x)), _square()),
    "cholesky, upper": Function(lambda xp, x: xp.linalg.cholesky(_definite(xp, x), upper=True), _square()),
    "qr": Function(
        lambda xp, x: xp.linalg.qr(x + 3 * xp.eye(*x.shape[-2:], dtype=x.dtype, device=x.device))[0], _tall()
    ),
    "qr, both": Function(lambda xp, x: (lambda qr: qr[0] @ xp.sin(qr[1]))(xp.linalg.qr(_separate(xp, x))), _tall()),
    "eigh": Function(
        lambda xp, x: (lambda found: (found[1] * xp.sin(found[0])[..., None, :]) @ found[1].mT)(
            xp.linalg.eigh(_symmetric(_separate(xp, x)))
        ),
        _square(),
    ),
    "eigvalsh": Function(lambda xp, x: xp.linalg.eigvalsh(_symmetric(_separate(xp, x))), _square()),
    "svd": Function(
        lambda xp, x: (lambda u, s, vh: (u * xp.sin(s)[..., None, :]) @ vh)(
            *xp.linalg.svd(_separate(xp, x), full_matrices=False)
        ),
        _any_matrix(),
    ),
    "svd, vectors": Function(
        lambda xp, x: (lambda u, s, vh: u @ u.mT + xp.sum(vh.mT @ vh))(
            *xp.linalg.svd(_separate(xp, x)[..., :2], full_matrices=False)
        ),
        _fixed((4, 4)),
    ),
    "svdvals": Function(lambda xp, x: xp.linalg.svdvals(_separate(xp, x)), _any_matrix()),
    "pinv": Function(lambda xp, x: xp.linalg.pinv(_separate(xp, x)), _any_matrix()),
    "matrix_power": Function(
        lambda xp, x: xp.linalg.matrix_power(x, 5) + xp.linalg.matrix_power(_regular(xp, x), -2), _square()
    ),
    "cross": Function(lambda xp, a, b: xp.linalg.cross(a, b), _fixed((2, 3), (2, 3))),
    "diagonal": Function(
        lambda xp, x: (
            xp.sum(xp.linalg.diagonal(x) ** 2, axis=-1)
            + xp.sum(xp.linalg.diagonal(x, offset=1), axis=-1)
            + xp.sum(xp.linalg.diagonal(x, offset=-2), axis=-1)
        ),
        _fixed((2, 4, 3)),
    ),
    "trace": Function(lambda xp, x: xp.linalg.trace(x), _square(), complex=True),
    "vector_norm": Function(
        lambda xp, x: xp.linalg.vector_norm(x) + xp.linalg.vector_norm(x, axis=-1, keepdims=True), _some, complex=True
    ),
    "vector_norms": Function(
        lambda xp, x: sum(xp.linalg.vector_norm(x, axis=0, ord=n) for n in (1, 3, 0, float("inf"), float("-inf"))),
        _some,
    ),
    "matrix_norm": Function(
        lambda xp, x: sum(xp.linalg.matrix_norm(_separate(xp, x), ord=n) for n in ("fro", "nuc", 1, -1, 2, -2)),
        _square(),
    ),
    "matrix_norm, kept": Function(
        lambda xp, x: xp.linalg.matrix_norm(x, keepdims=True, ord=float("inf")) * x, _any_matrix()
    ),
    # Fourier transforms.
    "fft": Function(lambda xp, x: xp.fft.fft(x), _some, complex="only"),
    "fft of real numbers": Function(lambda xp, x: xp.fft.fft(x), _some, standard=False),
    "fft, norm and length": Function(lambda xp, x: xp.fft.fft(x, n=5, axis=0, norm="ortho"), _some, complex="only"),
    "ifft": Function(
        lambda xp, x: xp.fft.ifft(x, n=2, norm="forward") + xp.fft.ifft(x)[..., :1], _some, complex="only"
    ),
    "rfft": Function(lambda xp, x: xp.fft.rfft(x), _some),
    "rfft, norm and length": Function(lambda xp, x: xp.fft.rfft(x, n=4, axis=0, norm="forward"), _some),
    "irfft": Function(lambda xp, x: xp.fft.irfft(x, n=5) + xp.fft.irfft(x, n=4)[..., :1], _some, complex="only"),
    "irfft, norm": Function(lambda xp, x: xp.fft.irfft(x, axis=0, norm="ortho"), _fixed((3, 2)), complex="only"),
    "convolution": Function(
        lambda xp, a, b: xp.fft.irfft(xp.fft.rfft(a) * xp.fft.rfft(b), n=a.shape[-1]), _fixed((2, 5), (5,))
    ),
    "fftn": Function(lambda xp, x: xp.fft.fftn(x) + xp.fft.ifftn(x, axes=(0,)), _fixed((2, 3)), complex="only"),
    "rfftn": Function(lambda xp, x: xp.fft.irfftn(xp.fft.rfftn(x) * 2j, s=(2, 3)), _fixed((2, 3))),
    "hfft": Function(lambda xp, x: xp.fft.hfft(x, n=4), _fixed((2, 3)), complex="only"),
    "ihfft": Function(lambda xp, x: xp.fft.ihfft(x, norm="ortho"), _fixed((2, 4))),
    "shifts": Function(lambda xp, x: xp.fft.fftshift(x) + xp.fft.ifftshift(x, axes=(0,)) * 2, _fixed((3, 5))),
}
