"""Seeded draws, made on the host by a counter-based generator: the same seed gives the same bits for every library.

Each parameter has a stream of its own, keyed by the seed and its names, so that adding a layer or a method changes no
other layer's draw. `TorchStream` draws what torch does, for checkpoints that hold a seed in place of a matrix.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

from peftarray.dtypes import rounded

__all__ = [
    "Draw",
    "TorchStream",
    "full",
    "kaiming_uniform",
    "normal",
    "normal_of",
    "uniform",
    "uniform_within",
    "zeros",
]

_BLOCK = 1 << 16
"""Draws made at once, so that what lies between stays in the cache."""


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


def uniform_within(bound: float) -> Draw:
    """A draw that is uniform over +-bound."""
    return lambda seed, stream, shape: (2 * uniform(seed, stream, shape) - 1) * np.float32(bound)


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


class TorchStream:
    """What torch's CPU generator draws after `manual_seed(seed)`, bit for bit: tensors in the order of the calls.

    The generator is MT19937 (Matsumoto and Nishimura, Mersenne Twister, 1998), seeded with the low 32 bits.

    Args:
        seed: any whole number of 64 bits, with or without a sign.

    Example:
        >>> TorchStream(0).uniform((2,), 0.0, 1.0).tolist()
        [0.49625658988952637, 0.7682217955589294]
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)

    def uniform(self, shape: tuple[int, ...], low: float, high: float, dtype: str = "float32") -> np.ndarray:
        """What `uniform_(low, high)` fills a tensor with: float32 values, such as `dtype` can hold.

        Args:
            shape: of the tensor.
            low, high: the bounds.
            dtype: the tensor's: `"float32"`, `"bfloat16"` or `"float16"`.
        """
        first, last = np.float32(low), np.float32(high)
        # A word gives 24 bits. Their product with the width is added to the bound with one rounding, by a fused
        # instruction; in float64 both are exact before it.
        step, start = float(last - first) * 2.0**-24, float(first)
        values = np.empty(math.prod(shape), np.float32)
        for begin in range(0, len(values), _BLOCK):
            part = values[begin : begin + _BLOCK]
            words = self._words.randint(0, 1 << 32, size=len(part), dtype=np.uint32)
            part[...] = (words & 0xFFFFFF) * step + start
        if dtype != "float32":
            values = rounded(values, dtype)
            # What rounds up to the upper bound, which is open, becomes the lower.
            bounds = rounded(np.array([first, last]), dtype)
            values[values >= bounds[1]] = bounds[0]
        return values.reshape(shape)

    def kaiming_uniform(self, shape: tuple[int, int]) -> np.ndarray:
        """Uniform over +-sqrt(6 / fan_in): He et al.'s bound for rectifiers."""
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        return self.uniform(shape, -bound, bound)
