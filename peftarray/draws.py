"""Random numbers by a key, for dropout: a pure function of the key and the place, the same for every library.

The bits are a hash of each entry's place, made by whole-number arithmetic where the array lies: nothing comes from the
host, a compiled step may have the key as an argument, and a step that is run again draws the same.
"""

from __future__ import annotations

import math
from typing import Any

from peftarray.arrays import Array, device, namespace
from peftarray.errors import ConfigError

__all__ = ["KeyedDraws", "dropout", "step_key"]

_BITS = 24


def step_key(seed: int, step: int) -> int:
    """The key of a step: a whole number below 2^31.

    Example:
        >>> step_key(0, 1) == step_key(0, 1), step_key(0, 1) == step_key(0, 2)
        (True, False)
    """
    return _number(f"{seed}/{step}")


def dropout(x: Array, rate: float, key: Any, *, stream: str = "") -> Array:
    """`x` with each entry at 0 with probability `rate`, and divided by `1 - rate` otherwise.

    Args:
        x: floating-point numbers.
        rate: from 0 to below 1; 0 gives `x` itself.
        key: of the step, as `step_key` makes it; an array of one under `jax.jit`. None, as in an evaluation, drops
            nothing.
        stream: a name for each place in a model, so that two with the same key drop other entries.

    Source: Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014, section 4.

    Example:
        >>> import numpy as np
        >>> dropout(np.ones(8, np.float32), 0.5, step_key(0, 0)).tolist()
        [2.0, 2.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0]
    """
    if type(rate) not in (int, float) or not 0 <= rate < 1:
        message = f"the rate of dropout is {rate!r}; it must be a number from 0 to below 1"
        raise ConfigError(message)
    if rate == 0 or key is None:
        return x
    stays = _bits(x.shape, x, key, stream) >= round(rate * (1 << _BITS))
    return x * (namespace(x).astype(stays, x.dtype) * (1 / (1 - rate)))


class KeyedDraws:
    """A source of random numbers that moves on with every call, as `Adapter.forward` takes it.

    Where a part of a model is run twice (a checkpoint), it takes numbers `within` a name, which starts anew each time.

    Args:
        key: of the step.
        place: a name for the part of the model.

    Example:
        >>> import numpy as np
        >>> draws = KeyedDraws(step_key(0, 0))
        >>> one, two = (draws.uniform((2,), np.ones(1)) for _ in range(2))
        >>> bool((one == KeyedDraws(step_key(0, 0)).uniform((2,), np.ones(1))).all()), bool((one == two).any())
        (True, False)
    """

    def __init__(self, key: Any, place: str = "") -> None:
        self._key, self._place, self._calls = key, place, 0

    def within(self, name: str) -> KeyedDraws:
        """A source for a part of this part, from its beginning."""
        return KeyedDraws(self._key, f"{self._place}/{name}")

    def dropped(self, x: Array, share: float) -> Array:
        """`x` with this share of its entries zero, the others divided by `1 - share`."""
        return dropout(x, share, self._key, stream=self._next())

    def uniform(self, shape: tuple[int, ...], like: Array) -> Array:
        """Numbers of [0, 1) in the library, device and dtype of `like`."""
        bits = _bits(shape, like, self._key, self._next())
        return namespace(like).astype(bits, like.dtype) * 2.0**-_BITS

    def _next(self) -> str:
        self._calls += 1
        return f"{self._place}/{self._calls}"


def _bits(shape: tuple[int, ...], like: Array, key: Any, stream: str) -> Array:
    """Whole numbers of 24 random bits beside `like`."""
    xp = namespace(like)
    places = xp.arange(math.prod(shape), dtype=xp.int32, device=device(like))
    # The key goes in twice: once alone, it would only move the pattern.
    bits = _mixed(_mixed(places ^ key) + key ^ _number(stream))
    return xp.reshape(bits & ((1 << _BITS) - 1), shape)


def _mixed(x: Array) -> Array:
    """A hash of 32-bit integers that depends on every bit of them (C. Wellons, Hash Prospector, "lowbias32").

    Signed, as not every library multiplies unsigned ones: overflow wraps, and shifts are cut to what unsigned ones
    give.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x


def _number(text: str) -> int:
    """A hash of a text below 2^31 (Fowler, Noll and Vo, "FNV-1a"), in arithmetic that torch's compiler traces."""
    number = 0x811C9DC5
    for character in text:
        number = (number ^ ord(character)) * 0x01000193 & 0xFFFFFFFF
    return (number ^ number >> 15) & 0x7FFFFFFF
