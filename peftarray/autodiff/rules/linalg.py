"""Linear algebra. With H the conjugate transpose, Y the value and G its gradient; sources: Giles, Collected matrix
derivative results for forward and reverse mode algorithmic differentiation, 2008; Golub and Pereyra, 1973 (pinv)."""

from __future__ import annotations

from typing import Any

from peftarray.arrays import Array, device
from peftarray.autodiff.rules.family import Family, Needs, Result, Wanted, conj
from peftarray.autodiff.rules.products import PRODUCTS
from peftarray.autodiff.rules.reductions import axes_of
from peftarray.autodiff.rules.shapes import SHAPES
from peftarray.autodiff.tape import is_complex
from peftarray.errors import PeftError

__all__ = ["LINALG"]

LINALG = Family({"matrix_transpose": SHAPES.rules["matrix_transpose"]}, constants={"matrix_rank"}).with_(PRODUCTS)


def _adjoint(xp: Any, x: Array) -> Array:
    return conj(xp, x).mT


def _real_only(name: str, x: Array) -> None:
    if is_complex(x.dtype):
        message = f"linalg.{name} of complex matrices has no derivative here; split it into real and imaginary parts"
        raise PeftError(message)


@LINALG.rule("inv")
def _inv(xp: Any, needs: Needs, x: Array, /) -> Result:
    value = xp.linalg.inv(x)

    def pull(g: Array) -> Wanted:
        back = _adjoint(xp, value)
        return (-(back @ g @ back),)

    return value, pull


@LINALG.rule("solve")
def _solve(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    value = xp.linalg.solve(a, b)
    kept = value if needs[0] else None
    vector = b.ndim == 1  # the only case where it is not a stack of matrices

    def pull(g: Array) -> Wanted:
        to_b = xp.linalg.solve(_adjoint(xp, a), g[..., None] if vector else g)
        right = kept[..., None] if vector and kept is not None else kept
        return (
            None if right is None else -(to_b @ _adjoint(xp, right)),
            to_b[..., 0] if vector else to_b,
        )

    return value, pull


@LINALG.rule("det")
def _det(xp: Any, needs: Needs, x: Array, /) -> Result:
    value = xp.linalg.det(x)
    return value, lambda g: ((g * conj(xp, value))[..., None, None] * _adjoint(xp, xp.linalg.inv(x)),)


@LINALG.rule("slogdet")
def _slogdet(xp: Any, needs: Needs, x: Array, /) -> Result:
    _real_only("slogdet", x)
    sign, log = xp.linalg.slogdet(x)

    def pull(parts: Wanted) -> Wanted:
        g = parts[1]
        return (None if g is None else g[..., None, None] * xp.linalg.inv(x).mT,)

    return (sign, log), pull


@LINALG.rule("cholesky")
def _cholesky(xp: Any, needs: Needs, x: Array, /, *, upper: bool = False) -> Result:
    _real_only("cholesky", x)
    lower = xp.linalg.cholesky(x)

    def pull(g: Array) -> Wanted:
        inner = xp.tril(lower.mT @ (g.mT if upper else g))
        inner = inner - _diagonal_part(xp, inner) * 0.5
        left = xp.linalg.solve(lower.mT, inner)
        whole = xp.linalg.solve(lower.mT, left.mT).mT
        return ((whole + whole.mT) * 0.5,)

    return lower.mT if upper else lower, pull


@LINALG.rule("qr")
def _qr(xp: Any, needs: Needs, x: Array, /, *, mode: str = "reduced") -> Result:
    _real_only("qr", x)
    if x.shape[-2] < x.shape[-1] or (mode != "reduced" and x.shape[-2] != x.shape[-1]):
        message = f"linalg.qr of {x.shape}, mode {mode!r}, has no derivative; it needs m >= n and mode 'reduced'"
        raise PeftError(message)
    q, r = xp.linalg.qr(x, mode=mode)

    def pull(parts: Wanted) -> Wanted:
        to_q, to_r = (xp.zeros_like(v) if g is None else g for g, v in zip(parts, (q, r), strict=True))
        m = r @ to_r.mT - to_q.mT @ q
        symmetric = xp.tril(m) + xp.tril(m, k=-1).mT
        return (xp.linalg.solve(r, (to_q + q @ symmetric).mT).mT,)

    return (q, r), pull


@LINALG.rule("eigh")
def _eigh(xp: Any, needs: Needs, x: Array, /) -> Result:
    """Of a loss that does not depend on the vectors' signs, at distinct eigenvalues."""
    _real_only("eigh", x)
    values, vectors = xp.linalg.eigh(x)

    def pull(parts: Wanted) -> Wanted:
        to_values, to_vectors = parts
        inner = xp.zeros_like(x) if to_vectors is None else _over_gaps(xp, vectors.mT @ to_vectors, values)
        inner = inner if to_values is None else inner + _as_diagonal(xp, to_values)
        whole = vectors @ inner @ vectors.mT
        return ((whole + whole.mT) * 0.5,)

    return (values, vectors), pull


@LINALG.composition("eigvalsh")
def _eigvalsh(xp: Any, x: Array, /) -> Array:
    return xp.linalg.eigh(x)[0]


@LINALG.rule("svd")
def _svd(xp: Any, needs: Needs, x: Array, /, *, full_matrices: bool = True) -> Result:
    """Of a loss that does not depend on the vectors' signs, at distinct singular values."""
    _real_only("svd", x)
    if full_matrices and x.shape[-1] != x.shape[-2]:
        message = f"linalg.svd of {x.shape} with full_matrices=True has no derivative; ask for full_matrices=False"
        raise PeftError(message)
    u, s, vh = xp.linalg.svd(x, full_matrices=False)

    def pull(parts: Wanted) -> Wanted:
        to_u, to_s, to_vh = parts
        inner = xp.zeros_like(u.mT @ u) if to_s is None else _as_diagonal(xp, to_s)
        outside = None
        if to_u is not None:
            turn = _over_gaps(xp, u.mT @ to_u, s * s)
            inner = inner + (turn + turn.mT) * s[..., None, :]
            outside = (to_u - u @ (u.mT @ to_u)) / s[..., None, :] @ vh
        if to_vh is not None:
            turn = _over_gaps(xp, vh @ to_vh.mT, s * s)
            inner = inner + s[..., :, None] * (turn + turn.mT)
            beside = u @ ((to_vh - (to_vh @ vh.mT) @ vh) / s[..., :, None])
            outside = beside if outside is None else outside + beside
        whole = u @ inner @ vh
        return (whole if outside is None else whole + outside,)

    return (u, s, vh), pull


@LINALG.rule("svdvals")
def _svdvals(xp: Any, needs: Needs, x: Array, /) -> Result:
    u, s, vh = xp.linalg.svd(x, full_matrices=False)
    return s, lambda g: ((u * g[..., None, :]) @ vh,)


@LINALG.rule("pinv")
def _pinv(xp: Any, needs: Needs, x: Array, /, **options: Any) -> Result:
    """While the rank does not change."""
    _real_only("pinv", x)
    p = xp.linalg.pinv(x, **options)

    def pull(g: Array) -> Wanted:
        a = -(p.mT @ g @ p.mT)
        right, left = g.mT @ p @ p.mT, p.mT @ p @ g.mT
        return (a + right - x @ (p @ right) + left - (left @ p) @ x,)

    return p, pull


@LINALG.composition("matrix_power")
def _matrix_power(xp: Any, x: Array, n: int, /) -> Array:
    x = xp.linalg.inv(x) if n < 0 else x
    power = xp.zeros_like(x) + xp.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for digit in f"{abs(n):b}".lstrip("0"):
        power = power @ power
        power = power @ x if digit == "1" else power
    return power


@LINALG.rule("cross")
def _cross(xp: Any, needs: Needs, a: Array, b: Array, /, *, axis: int = -1) -> Result:
    return xp.linalg.cross(a, b, axis=axis), lambda g: (
        xp.linalg.cross(*xp.broadcast_arrays(conj(xp, b), g), axis=axis),
        xp.linalg.cross(*xp.broadcast_arrays(g, conj(xp, a)), axis=axis),
    )


@LINALG.rule("diagonal")
def _diagonal(xp: Any, needs: Needs, x: Array, /, *, offset: int = 0) -> Result:
    rows, columns = x.shape[-2:]

    def pull(g: Array) -> Wanted:
        eye = xp.eye(rows, columns, k=offset, dtype=g.dtype, device=device(g))
        # Entry i of the diagonal lies in row i if it starts in the first row, else in column i.
        length = rows if offset >= 0 else columns
        rest = xp.zeros((*g.shape[:-1], length - g.shape[-1]), dtype=g.dtype, device=device(g))
        g = xp.concat([g, rest], axis=-1)
        return (eye * (g[..., :, None] if offset >= 0 else g[..., None, :]),)

    return xp.linalg.diagonal(x, offset=offset), pull


@LINALG.composition("trace")
def _trace(xp: Any, x: Array, /, *, offset: int = 0, dtype: Any = None) -> Array:
    return xp.sum(xp.linalg.diagonal(x, offset=offset), axis=-1, dtype=dtype)


@LINALG.composition("vector_norm")
def _vector_norm(xp: Any, x: Array, /, *, axis: Any = None, keepdims: bool = False, ord: float = 2) -> Array:
    if ord == 2:
        return xp.linalg._euclidean_norm(x, axis=axis, keepdims=keepdims)
    if ord == 0:
        return xp.sum(xp.astype(x != 0, x.dtype), axis=axis, keepdims=keepdims)
    size = xp.abs(x)
    if ord in (float("inf"), float("-inf")):
        return (xp.max if ord > 0 else xp.min)(size, axis=axis, keepdims=keepdims)
    if ord == 1:
        return xp.sum(size, axis=axis, keepdims=keepdims)
    return xp.sum(size**ord, axis=axis, keepdims=keepdims) ** (1 / ord)


@LINALG.rule("_euclidean_norm")
def _euclidean_norm(xp: Any, needs: Needs, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Result:
    """Zero has the gradient zero."""
    norm = xp.linalg.vector_norm(x, axis=axis, keepdims=True)
    value = norm if keepdims else xp.squeeze(norm, axis=axes_of(x.shape, axis))
    return value, lambda g: (x * (xp.reshape(g, norm.shape) / xp.where(norm == 0, 1, norm)),)


@LINALG.composition("matrix_norm")
def _matrix_norm(xp: Any, x: Array, /, *, keepdims: bool = False, ord: Any = "fro") -> Array:
    if ord == "fro":
        return xp.linalg.vector_norm(x, axis=(-2, -1), keepdims=keepdims)
    if ord in (1, -1, float("inf"), float("-inf")):
        sums = xp.sum(xp.abs(x), axis=-2 if abs(ord) == 1 else -1)
        norm = (xp.max if ord > 0 else xp.min)(sums, axis=-1)
    else:
        values = xp.linalg.svdvals(x)
        norm = xp.sum(values, axis=-1) if ord == "nuc" else values[..., 0 if ord > 0 else -1]
    return norm[..., None, None] if keepdims else norm


def _as_diagonal(xp: Any, values: Array) -> Array:
    return values[..., None, :] * xp.eye(values.shape[-1], dtype=values.dtype, device=device(values))


def _diagonal_part(xp: Any, x: Array) -> Array:
    return x * xp.eye(x.shape[-1], dtype=x.dtype, device=device(x))


def _over_gaps(xp: Any, x: Array, values: Array) -> Array:
    """`x_ij / (values_j - values_i)` beside the diagonal, zero on it."""
    gaps = values[..., None, :] - values[..., :, None]
    eye = xp.eye(values.shape[-1], dtype=values.dtype, device=device(values))
    return (x - _diagonal_part(xp, x)) / (gaps + eye)
