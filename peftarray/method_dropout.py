"""What training leaves out at random of a method: inputs of the update, its outputs, the whole of it, or blocks of
parameters.

A method says what (`AdapterConfig.dropout`); the draw comes from outside, since every library has random numbers of its
own, and a compiled function must be given them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftarray.arrays import Array, Params, namespace
from peftarray.layers import Layer, contract, scale_outputs

if TYPE_CHECKING:
    from peftarray.method import AdapterConfig

__all__ = ["Drop", "Dropout", "applied_with_dropout", "update_with_dropout"]

Drop = Callable[[Array, float], Array]
"""An array with each entry 0 with this probability, and divided by the probability that it is not."""


@dataclass(frozen=True)
class Dropout:
    """What one method leaves out in training. All shares are between 0 and 1.

    Attributes:
        inputs: share of the entries of `x` that the update does not see, while the others grow accordingly.
        outputs: share of the update's outputs that are zero.
        rescaled: whether the other outputs grow by the inverse of the share that is left.
        update: probability that the whole update is left out of a step.
        blocks: share of the blocks of an array that are zero.
        parameter: that array's name, `(block, ...)` or `(stack, block, ...)`.
        stacked: whether it is the second.
    """

    inputs: float = 0.0
    outputs: float = 0.0
    rescaled: bool = False
    update: float = 0.0
    blocks: float = 0.0
    parameter: str = ""
    stacked: bool = False


def applied_with_dropout(method: AdapterConfig, params: Params, x: Array, w: Array, layer: Layer, drop: Drop) -> Array:
    """`method.apply` in training. Where nothing is dropped it is the same.

    Args:
        method: resolved for the layer.
        params: raw.
        x, w, layer: as for `apply`.
        drop: the draw.
    """
    wanted = method.dropout()
    if wanted.inputs or wanted.outputs or wanted.update:
        return contract(x, w, layer) + update_with_dropout(method, params, x, w, layer, drop)
    return method.apply(method.prepare(_without_blocks(params, wanted, drop), layer), x, w, layer)


def update_with_dropout(
    method: AdapterConfig, params: Params, x: Array, w: Array | None, layer: Layer, drop: Drop
) -> Array:
    """`method.apply_update` in training; arguments as above."""
    wanted = method.dropout()
    prepared = method.prepare(_without_blocks(params, wanted, drop), layer)
    seen = drop(x, wanted.inputs) if wanted.inputs and layer.kind != "embedding" else x
    update = method.apply_update(prepared, seen, w, layer)
    if wanted.outputs:
        kept = _kept((layer.out,), update, wanted.outputs, drop)
        update = scale_outputs(update, kept / namespace(kept).mean(kept) if wanted.rescaled else kept, layer)
    if wanted.update:
        update = update * _kept((1,), update, wanted.update, drop)
    return update


def _kept(shape: tuple[int, ...], like: Array, share: float, drop: Drop) -> Array:
    """0 for this share of the entries, 1 for the others."""
    one = namespace(like).ones_like(like[(0,) * like.ndim])
    return drop(namespace(one).broadcast_to(one, shape), share) * (1 - share)


def _without_blocks(params: Params, wanted: Dropout, drop: Drop) -> Params:
    """The parameters, one of them with zero in some of its blocks; a single block, which stands for all, is kept."""
    if not wanted.blocks:
        return params
    array = params[wanted.parameter]
    grid = tuple(array.shape[: 2 if wanted.stacked else 1])
    if grid[-1] == 1:
        return params
    kept = _kept(grid, array, wanted.blocks, drop)
    return {
        **params,
        wanted.parameter: array * namespace(kept).reshape(kept, (*grid, *(1 for _ in array.shape[len(grid) :]))),
    }
