"""LoftQ: a quantised weight, and the low-rank factors that make up best for what quantising lost.

Source: Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023, algorithm 1,
arXiv:2310.08659.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftarray.arrays import Array, namespace
from peftarray.errors import ConfigError, ShapeError
from peftarray.quant.codec import Codec
from peftarray.quant.four_bit import NormalFloat
from peftarray.quant.int8 import Int8Rows

__all__ = ["codec_of_bits", "loftq_factors", "lost_factors", "settings_of"]

_CODECS: dict[int, Codec] = {4: NormalFloat(double=False), 8: Int8Rows()}


def settings_of(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """Bits and iterations of a `loftq_config` as PEFT writes it: `{"loftq_bits": 4, "loftq_iter": 1}`.

    Raises:
        ConfigError: it has another key, or a value that is not allowed.
    """
    given = dict(config or {})
    bits, iterations = given.pop("loftq_bits", 4), given.pop("loftq_iter", 1)
    if given or bits not in _CODECS or type(iterations) is not int or iterations < 1:
        message = (
            f"loftq_config is {config!r}; it may have loftq_bits ({' or '.join(map(str, _CODECS))}) and loftq_iter (at "
            "least 1)"
        )
        raise ConfigError(message)
    return bits, iterations


def codec_of_bits(bits: int) -> Codec:
    """The codec that PEFT's LoftQ takes for so many bits: NF4 without quantised scales, or rows of int8."""
    return _CODECS[bits]


def loftq_factors(
    weight: Array, codec: Codec, rank: int, *, iterations: int = 1, transposed: bool = False
) -> tuple[dict[str, Array], Array, Array]:
    """Parts of `Q`, and `up (out, r)`, `down (r, in)`, such that `Q + up @ down` is close to the weight.

    In turns: `Q = quantise(W - up down)`, and `up down` the best approximation of `W - Q` of this rank. The two factors
    have the same singular values.

    Args:
        weight: `(out, in)`, or `(in, out)` if `transposed`; it is quantised as it is stored.
        codec: how.
        rank: of the factors.
        iterations: turns; more of them get closer, at the price of a singular value decomposition each.
        transposed: how the weight is stored.

    Raises:
        ShapeError: the rank is more than the weight has, or the codec cannot store it.

    Example:
        >>> import numpy as np
        >>> weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
        >>> codec = codec_of_bits(4)
        >>> parts, up, down = loftq_factors(weight, codec, 8, iterations=3)
        >>> base = codec.dequantize(parts, weight.shape)
        >>> bool(np.linalg.norm(base + up @ down - weight) < np.linalg.norm(base - weight))
        True
    """
    shape = _checked(weight, rank)
    xp = namespace(weight)
    wide: Array = xp.astype(weight, xp.float32)
    rest, parts = wide, {}
    up, down = wide, wide
    for _ in range(iterations):
        parts = codec.quantize(rest)
        up, down = _best(_turned(wide - codec.dequantize(parts, shape), transposed), rank)
        rest = wide - _turned(up @ down, transposed)
    return parts, up, down


def lost_factors(weight: Array, base: Array, rank: int, *, transposed: bool = False) -> tuple[Array, Array]:
    """`up (out, r)` and `down (r, in)`, such that `base + up @ down` is closest to the weight.

    Args:
        weight: `(out, in)`, or `(in, out)` if `transposed`.
        base: what is left of it, in the same shape.
        rank: of the factors.
        transposed: how both are stored.

    Raises:
        ShapeError: the rank is more than the weight has.
    """
    _checked(weight, rank)
    xp = namespace(weight)
    return _best(_turned(xp.astype(weight, xp.float32) - base, transposed), rank)


def _checked(weight: Array, rank: int) -> tuple[int, ...]:
    shape = tuple(weight.shape)
    if len(shape) != 2 or not 1 <= rank <= min(shape):
        message = f"LoftQ of rank {rank} on a weight of shape {shape}; the rank must be from 1 to its smaller side"
        raise ShapeError(message)
    return shape


def _turned(matrix: Array, transposed: bool) -> Array:
    return matrix.mT if transposed else matrix


def _best(matrix: Array, rank: int) -> tuple[Array, Array]:
    """The best approximation of this rank as two factors, each with the roots of the singular values."""
    xp = namespace(matrix)
    u, s, vh = xp.linalg.svd(matrix, full_matrices=False)
    root = xp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vh[:rank, :]
