"""Layers: how a stored weight becomes the `(out, fan_in)` matrix that methods see, and how that acts on activations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from peftarray.arrays import Array, namespace
from peftarray.errors import ShapeError

__all__ = [
    "Kind",
    "Layer",
    "Peers",
    "Window",
    "contract",
    "expand",
    "pays",
    "scale_outputs",
    "through",
    "tucker_factor",
]

Kind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True)
class Window:
    """How a convolution slides over its input: one number for all axes, or one for each.

    Attributes:
        stride, padding, dilation: in elements of the input, zero padding.
        groups: input and output channels are split into so many independent groups.
    """

    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1


class Peers(tuple["Layer", ...]):
    """Every layer that one adapter is on."""

    @cached_property
    def largest(self) -> tuple[int, int]:
        """The most outputs, and the most inputs, that one of them has."""
        return max(layer.out for layer in self), max(layer.fan_in for layer in self)


@dataclass(frozen=True)
class Layer:
    """What a method knows of the layer whose weight it adapts. Always the whole layer, also while a tile is worked on.

    Attributes:
        name: the module's name in the model, such as `model.layers.0.self_attn.q_proj`.
        kind: `"linear"`, `"embedding"` or `"conv"`.
        shape: logical shape `(out, in)`, for convolutions `(out, in / groups, *kernel)`. For an embedding stored
            `(vocab, dim)`, methods that see it as a linear map from one-hot rows have `(dim, vocab)`.
        transposed: whether the stored weight is the transpose, `(in, out)`: transformers' Conv1D, embeddings.
        bias: whether the layer has a bias.
        window: of a convolution.
        dtype: what the model stores the weight in, such as `"bfloat16"`; empty where that is not known.
        peers: every layer of this adapter, where a method needs to know them.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    transposed: bool = False
    bias: bool = False
    window: Window = Window()
    dtype: str = ""
    peers: Peers = field(default_factory=Peers)

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def fan_in(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight as the model holds it."""
        return self.shape[::-1] if self.transposed else self.shape

    def view(self, weight: Array) -> Array:
        """The stored weight as the `(out, fan_in)` matrix; a view where the library has views.

        Raises:
            ShapeError: the weight has another shape than this layer.
        """
        if tuple(weight.shape) != self.stored_shape:
            message = f"{self.name}: the weight is {tuple(weight.shape)}; this layer wants {self.stored_shape}"
            raise ShapeError(message)
        if self.transposed:
            return weight.mT
        return namespace(weight).reshape(weight, (self.out, self.fan_in)) if self.kernel else weight

    def unview(self, matrix: Array) -> Array:
        """The `(out, fan_in)` matrix as the model stores it: the inverse of `view`."""
        if self.transposed:
            return matrix.mT
        return namespace(matrix).reshape(matrix, self.shape) if self.kernel else matrix


def contract(x: Array, matrix: Array, layer: Layer) -> Array:
    """Activations through an `(n, fan_in)` matrix in place of the layer's: `(..., in)` to `(..., n)`.

    For an embedding `x` holds row numbers `(...)`; for a convolution it is `(batch, in, *space)` and the result
    `(batch, n, *space')`.
    """
    if layer.kind == "embedding":
        xp = namespace(matrix)
        table = matrix.mT if layer.transposed else matrix
        rows = xp.take(table, xp.reshape(x, (-1,)), axis=0)
        return xp.reshape(rows, (*x.shape, table.shape[1]))
    if layer.kind == "conv":
        return _convolve(x, matrix, layer)
    return x @ matrix.mT


def expand(hidden: Array, matrix: Array, layer: Layer) -> Array:
    """What `contract` made, through a second matrix `(out, n)` on its channel axis."""
    if layer.kind != "conv":
        return hidden @ matrix.mT
    xp = namespace(hidden, matrix)
    flat = xp.reshape(hidden, (*hidden.shape[:2], -1))
    return xp.reshape(matrix @ flat, (hidden.shape[0], matrix.shape[0], *hidden.shape[2:]))


def through(x: Array, down: Array, up: Array, layer: Layer) -> Array:
    """Activations through two factors, `down (r, fan_in)` and `up (out, r)`, in place of the layer's matrix."""
    groups = layer.window.groups
    if groups == 1:
        return expand(contract(x, down, layer), up, layer)
    # All groups share `down`, and each has its own rows of `up`.
    xp = namespace(x, down, up)
    batch, rank = x.shape[0], up.shape[1]
    apart = replace(layer, window=replace(layer.window, groups=1))
    hidden = contract(xp.reshape(x, (batch * groups, layer.shape[1], *x.shape[2:])), down, apart)
    outputs = xp.reshape(up, (groups, -1, rank)) @ xp.reshape(hidden, (batch, groups, rank, -1))
    return xp.reshape(outputs, (batch, up.shape[0], *hidden.shape[2:]))


def pays(multiplications: int, layer: Layer) -> bool:
    """Whether a path of its own for the update pays, with so many multiplications an output position.

    Training runs them three times. The other way is one product with the sum of base and update; what that adds is the
    gradient of a whole weight.
    """
    return 3 * multiplications <= layer.out * layer.fan_in


def tucker_factor(core: Array, inner: Array) -> Array:
    """A Tucker core `(n, r, *kernel)` and its input factor `(r, in)` as one factor `(n, in * kernel)`."""
    rank = inner.shape[0]
    taps = namespace(core, inner).reshape(core, (core.shape[0], rank, -1))
    return namespace(core, inner).reshape(inner.mT @ taps, (core.shape[0], -1))


def scale_outputs(y: Array, gain: Array, layer: Layer) -> Array:
    """Each output channel of `y` times its entry of `gain` `(out,)`."""
    if layer.kind == "conv":
        gain = namespace(gain).reshape(gain, (-1, *(1 for _ in layer.kernel)))
    return y * gain


def _convolve(x: Array, matrix: Array, layer: Layer) -> Array:
    """Cross-correlation: the library's own where it has one, or a matrix product for each offset in the kernel."""
    xp = namespace(x, matrix)
    kernel, window = layer.kernel, layer.window
    rank = len(kernel)
    stride, padding, dilation = (_each(value, rank) for value in (window.stride, window.padding, window.dilation))
    # A factor that contracts all input channels at once has groups of its own: none.
    groups = window.groups if layer.shape[1] * window.groups == x.shape[1] and matrix.shape[1] == layer.fan_in else 1
    own = getattr(xp, f"conv{rank}d", None)
    if own is not None:
        taps = xp.reshape(matrix, (matrix.shape[0], x.shape[1] // groups, *kernel))
        return own(x, taps, None, stride, padding, dilation, groups)
    x = _pad(x, padding)
    space = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    weight = xp.reshape(matrix, (groups, matrix.shape[0] // groups, x.shape[1] // groups, *kernel))
    total = None
    for offset in itertools.product(*(range(k) for k in kernel)):
        starts = [o * d for o, d in zip(offset, dilation, strict=True)]
        window_slices = [slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(starts, space, stride, strict=True)]
        patch = xp.reshape(
            x[(slice(None), slice(None), *window_slices)], (x.shape[0], groups, x.shape[1] // groups, -1)
        )
        part = weight[(slice(None), slice(None), slice(None), *offset)] @ patch
        total = part if total is None else total + part
    return xp.reshape(total, (x.shape[0], matrix.shape[0], *space))


def _each(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _pad(x: Array, padding: tuple[int, ...]) -> Array:
    xp = namespace(x)
    for axis, width in enumerate(padding, start=2):
        if width:
            shape = list(x.shape)
            shape[axis] = width
            border = xp.zeros_like(x[tuple(slice(0, 1) if a == axis else slice(None) for a in range(x.ndim))])
            border = xp.broadcast_to(border, tuple(shape))
            x = xp.concat([border, x, border], axis=axis)
    return x
