"""Seeded draws, made on the host by a counter-based generator: the same seed gives the same bits for every library.

Each parameter has a stream of its own, keyed by the seed and its names, so that adding a layer or a method changes no
other layer's draw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

__all__ = ["Draw", "full", "kaiming_uniform", "normal", "normal_of", "uniform", "zeros"]


Draw = Callable[[int, str, tuple[int, ...]], np.ndarray]
"""Values from (seed, name of the stream, shape)."""


def _words(seed: int, stream: str, count: int) -> np.ndarray:
    """`count` 64-bit words of the Philox stream of a seed and a name (Salmon et al., Parallel random numbers, 2011)."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


def uniform(seed: int, stream: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values spread evenly over [0, 1), 24 bits each.

    Example:
        >>> uniform(0, "lora_A", (2,)).dtype
        dtype('float32')
    """
    words = _words(seed, stream, math.prod(shape))
    return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def normal(seed: int, stream: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of the standard normal distribution, by Box and Muller's transform in float64."""
    count = math.prod(shape)
    pairs = -(-count // 2)
    words = _words(seed, stream, 2 * pairs)
    unit = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(unit[:pairs])), 2.0 * np.pi * unit[pairs:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return values.astype(np.float32).reshape(shape)


def normal_of(deviation: float) -> Draw:
    """A draw like `normal`, with this standard deviation."""
    return lambda seed, stream, shape: normal(seed, stream, shape) * np.float32(deviation)


def kaiming_uniform(seed: int, stream: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform over +-1/sqrt(fan_in): He et al.'s bound with a = sqrt(5), which torch's layers start from."""
    bound = np.float32(1 / math.sqrt(math.prod(shape[1:])))
    return (2 * uniform(seed, stream, shape) - 1) * bound


def zeros(seed: int, stream: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 zeros: the draw that needs no randomness."""
    return np.zeros(shape, np.float32)


def full(value: float) -> Draw:
    """A draw that gives this value everywhere."""
    return lambda seed, stream, shape: np.full(shape, value, np.float32)
