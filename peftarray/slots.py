"""Slots: low-rank adapters of one layer in stacks of one shape, chosen by an index.

    down (K, R, in),  up (K, out, R)

Factors are padded to a rank R by zeros, which changes nothing, and scales are part of `up`. Slot 0 is zeros, so no
adapter. What is chosen is an array, `(1,)` for all rows of a batch or `(n,)` for one each: a compiled function goes on
as it is when another adapter is chosen, or takes a place in the stacks. All are functions of arrays, which return new
ones. An embedding's `down` is `(K, vocab, R)`, so that its rows can be looked up.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftarray.adapter import Adapter
from peftarray.arrays import Array, device, namespace
from peftarray.errors import ConfigError, ShapeError, UnsupportedError
from peftarray.layers import Layer
from peftarray.method_kinds import LowRank

__all__ = [
    "Factors",
    "padded",
    "put_slot",
    "slot_factors",
    "slot_update",
    "stack_slots",
    "thin_factors",
    "why_no_slot",
    "why_not_thin",
]

Factors = tuple[Array, Array]
"""`down` and `up` of one adapter, or the stacks of both."""


def why_not_thin(adapter: Adapter) -> str | None:
    """Why an adapter's update is no product of two thin factors that is added; None where it is."""
    if isinstance(adapter.config, LowRank) and adapter.adds_apart():
        return None
    return f"{type(adapter.config).__name__} with this configuration is no update of two thin factors"


def why_no_slot(adapter: Adapter) -> str | None:
    """Why an adapter cannot be put into slots; None where it can."""
    if "bias" in adapter.touches():
        return f"{type(adapter.config).__name__} changes the bias as well, and slots hold no biases"
    if adapter.config.keeps_tied():
        return "a tied head follows this adapter, and slots are of one weight"
    return why_not_thin(adapter) or (
        "a convolution has one kernel for a whole batch" if adapter.layer.kind == "conv" else None
    )


def thin_factors(adapter: Adapter, *, scale: float = 1.0) -> Factors:
    """`down (r, in)` and `up (out, r)` of an adapter that has two thin factors, the scale within `up`."""
    factors = adapter.product()
    assert factors is not None
    up, down = factors
    return down, up * scale


def padded(factors: Factors, rank: int) -> Factors:
    """`down (r, in)` and `up (out, r)` with zeros up to a rank."""
    down, up = factors
    missing = rank - down.shape[0]
    if not missing:
        return factors
    xp = namespace(down, up)
    down = xp.concat([down, _zeros((missing, down.shape[1]), down)], axis=0)
    return down, xp.concat([up, _zeros((up.shape[0], missing), up)], axis=1)


def slot_factors(adapter: Adapter, rank: int, *, scale: float = 1.0) -> Factors:
    """The factors that an adapter puts into a slot, padded to a rank.

    Args:
        adapter: of a low-rank method that adds to the layer's output.
        rank: of the slots.
        scale: what the adapter's update is multiplied by.

    Returns:
        `down (rank, in)`, for an embedding `(vocab, rank)`, and `up (out, rank)`, in float32 at least.

    Raises:
        UnsupportedError: the adapter cannot be put into slots.
        ConfigError: its rank is beyond the slots'.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoraConfig
        >>> adapter = LoraConfig(r=2, init_lora_weights=False).init(np.ones((5, 4), np.float32))
        >>> down, up = slot_factors(adapter, 8)
        >>> down.shape, up.shape, bool(np.allclose(up @ down, adapter.change(np.ones((5, 4), np.float32)), atol=1e-6))
        ((8, 4), (5, 8), True)
    """
    reason, name = why_no_slot(adapter), adapter.layer.name
    if reason is not None:
        message = f"{name}: {reason}; name the adapter of each row instead (adapter_names)"
        raise UnsupportedError(message)
    factors = thin_factors(adapter, scale=scale)
    own = factors[0].shape[0]
    if own > rank:
        message = f"{name}: the adapter has rank {own}, and the slots have {rank}; give them max_rank={own}"
        raise ConfigError(message)
    down, up = padded(factors, rank)
    return (down.mT if adapter.layer.kind == "embedding" else down), up


def stack_slots(factors: Sequence[Factors | None], *, like: Factors | None = None) -> Factors:
    """Stacks with a slot for each of these after slot 0, which is zeros.

    Args:
        factors: from `slot_factors`, all of one layer and rank; None for a slot that is free.
        like: factors of the same shapes, where none is given.

    Returns:
        `down (K, rank, in)` and `up (K, out, rank)`, K one more than the number given.
    """
    first = next((pair for pair in factors if pair is not None), like)
    if first is None:
        message = "slots are stacked of no factors; give at least one, or `like`"
        raise ConfigError(message)
    free = (_zeros(first[0].shape, first[0]), _zeros(first[1].shape, first[1]))
    every = [free, *(free if pair is None else pair for pair in factors)]
    xp = namespace(*first)
    return xp.stack([down for down, _ in every], axis=0), xp.stack([up for _, up in every], axis=0)


def put_slot(stacks: Factors, place: int, factors: Factors | None) -> Factors:
    """The stacks with other factors in one slot, and the same shapes; None frees the slot.

    Raises:
        ConfigError: there is no such slot, or it is slot 0.
        ShapeError: the factors have another shape.
    """
    count = stacks[0].shape[0]
    if not 0 < place < count:
        message = f"slot {place} cannot be filled; there are 1 to {count - 1}, and slot 0 stays empty"
        raise ConfigError(message)
    found = []
    for stack, new in zip(stacks, (None, None) if factors is None else factors, strict=True):
        own = _zeros(stack.shape[1:], stack) if new is None else new
        if own.shape != stack.shape[1:]:
            message = f"a slot holds {tuple(stack.shape[1:])}, and the factor is {tuple(own.shape)}"
            raise ShapeError(message)
        xp = namespace(stack, own)
        found.append(xp.concat([stack[:place, ...], own[None, ...], stack[place + 1 :, ...]], axis=0))
    return found[0], found[1]


def slot_update(x: Array, down: Array, up: Array, index: Array, layer: Layer) -> Array:
    """What the chosen slots add to a layer's output.

    Args:
        x: `(n, ..., in)`, or its rows `(n * m, in)` with those of one sample together; for an embedding, numbers of its
            rows.
        down, up: the stacks.
        index: whole numbers `(1,)`, a slot for all, or `(n,)`, one for each sample.
        layer: the layer.

    Returns:
        `(..., out)`, with the axes of `x`.

    Raises:
        ShapeError: `x` is not of so many samples.
    """
    xp = namespace(down, up, x)
    count = index.shape[0]
    if x.shape[0] % count:
        message = f"{layer.name}: {x.shape[0]} rows are not those of {count} samples"
        raise ShapeError(message)
    above = xp.take(up, index, axis=0)
    if layer.kind == "embedding":
        vocabulary, rank = down.shape[1:]
        places = xp.reshape(index, (count, 1)) * vocabulary + xp.reshape(x, (count, -1))
        hidden = xp.take(xp.reshape(down, (-1, rank)), xp.reshape(places, (-1,)), axis=0)
        lead = tuple(x.shape)
    else:
        hidden, lead = x, tuple(x.shape[:-1])
        below = xp.take(down, index, axis=0)
        if count == 1:
            hidden = x @ below[0, ...].mT
        else:
            hidden = xp.reshape(x, (count, -1, x.shape[-1])) @ below.mT
    if count == 1:
        y = xp.reshape(hidden, (-1, hidden.shape[-1])) @ above[0, ...].mT
    else:
        y = xp.reshape(hidden, (count, -1, hidden.shape[-1])) @ above.mT
    return xp.reshape(y, (*lead, y.shape[-1]))


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return namespace(like).zeros(tuple(shape), dtype=like.dtype, device=device(like))
