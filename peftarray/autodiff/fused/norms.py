"""Normalisations over the last axis: each beside its plain formula."""

from __future__ import annotations

from typing import Any

from peftarray.arrays import Array, device, namespace
from peftarray.autodiff.fused.memory import into, tiles
from peftarray.autodiff.primitive import primitive
from peftarray.autodiff.rules import Needs, Result, Wanted

__all__ = ["layer_norm", "rms_norm"]


def _rms_norm(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    """RMS norm: `x / sqrt(mean(x^2) + eps) weight`, the mean over the last axis.

    Args:
        x: `(..., d)`.
        weight: `(d,)`.
        eps: added under the root.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4, arXiv:1910.07467.
    """
    xp = namespace(x, weight)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


@primitive(formula=_rms_norm)
def rms_norm(xp: Any, needs: Needs, x: Array, weight: Array, *, eps: float = 1e-6) -> Result:
    scale = _inverse_root(xp, x, eps)
    value = _scaled(xp, x, scale, weight)
    wants_x, wants_weight = needs

    def pull(g: Array) -> Wanted:
        return _unscaled(xp, g, x, scale, weight) if wants_x else None, g * x * scale if wants_weight else None

    return value, pull


def _layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5) -> Array:
    """Layer norm: `(x - mean) / sqrt(var + eps) weight + bias`, mean and variance over the last axis.

    Args:
        x: `(..., d)`.
        weight, bias: `(d,)`; None for one and zero.
        eps: added under the root.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016, equation 4, arXiv:1607.06450.
    """
    xp = namespace(x, weight, bias)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    normal = centred / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


@primitive(formula=_layer_norm)
def layer_norm(
    xp: Any, needs: Needs, x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5
) -> Result:
    centred = x - _mean(xp, x)
    scale = _inverse_root(xp, centred, eps)
    value = _scaled(xp, centred, scale, 1.0 if weight is None else weight)
    if bias is not None:
        value += bias
    wants_x, wants_weight, wants_bias = (*needs, False, False)[:3]

    def pull(g: Array) -> Wanted:
        to_x = None
        if wants_x:
            to_x = _unscaled(xp, g, centred, scale, 1.0 if weight is None else weight)
            to_x -= _mean(xp, to_x)
        return to_x, g * centred * scale if wants_weight else None, g if wants_bias else None

    return value, pull


def _mean(xp: Any, x: Array) -> Array:
    """The mean of each row, as a column: a product is quicker than a sum."""
    return (x @ xp.full(x.shape[-1], 1.0 / x.shape[-1], dtype=x.dtype, device=device(x)))[..., None]


def _inverse_root(xp: Any, x: Array, eps: float) -> Array:
    """`1 / sqrt(mean(x^2) + eps)` of each row, as a column: a dot product is quicker than a mean of squares."""
    return 1.0 / xp.sqrt(xp.vecdot(x, x) / x.shape[-1] + eps)[..., None]


def _scaled(xp: Any, x: Array, scale: Array, weight: Array | float) -> Array:
    """`x scale weight`."""
    value = xp.empty(x.shape, dtype=x.dtype, device=device(x))
    for x_, scale_, value_ in tiles(xp, x, scale, value):
        into(value_, xp.multiply, x_, scale_)
        value_ *= weight
    return value


def _unscaled(xp: Any, g: Array, x: Array, scale: Array, weight: Array | float) -> Array:
    """The gradient of `x scale weight` for x, where `scale` is `_inverse_root` of x."""
    gradient = xp.empty(x.shape, dtype=g.dtype, device=device(g))
    for g_, x_, scale_, gradient_ in tiles(xp, g, x, scale, gradient):
        into(gradient_, xp.multiply, g_, weight)
        along = xp.vecdot(gradient_, x_)[:, None] * scale_ * scale_ / x.shape[-1]
        gradient_ -= x_ * along
        gradient_ *= scale_
    return gradient
