"""What a model computes in while the trained arrays stay float32, and the loss scale that float16 needs.

The loss sees every floating array of its arguments in the short dtype. Its gradients pass through that cast on the way
back and arrive in the arrays' own dtype, where they are summed, clipped and used.

Source: Micikevicius et al., Mixed Precision Training, 2018, sections 3.1 and 3.2, arXiv:1710.03740.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from peftarray import trees
from peftarray.arrays import Array, namespace
from peftarray.errors import ConfigError, UnsupportedError
from peftarray.settings import Rule, check_settings, number, one_of, setting, whole

__all__ = ["LossScale", "Precision", "precision_of"]

_NAMES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}
_above_one = Rule(lambda value: number(0.0).allows(value) and value > 1, "a number above 1")
_below_one = Rule(lambda value: number(0.0).allows(value) and 0 < value < 1, "a number between 0 and 1")


@dataclass(frozen=True)
class LossScale:
    """What the loss is multiplied by so that small gradients are not lost in float16; it finds its size by itself.

    After a step whose gradients overflow it becomes smaller, and after `interval` good ones in a row larger.

    Attributes:
        value: the factor.
        good: good steps since it last changed.
        growth, backoff: what it is multiplied by.
        interval: good steps before it grows.

    Example:
        >>> scale = LossScale(8.0, interval=2)
        >>> [scale := scale.after(finite) for finite in (False, True, True)][-1].value
        8.0
    """

    value: float = setting(2.0**16, number(0.0))
    good: int = setting(0, whole(0))
    growth: float = setting(2.0, _above_one)
    backoff: float = setting(0.5, _below_one)
    interval: int = setting(2000, whole(1))

    def __post_init__(self) -> None:
        check_settings(self)

    def after(self, finite: bool) -> LossScale:
        """The scale after a step whose gradients were finite, or were not."""
        if not finite:
            return replace(self, value=self.value * self.backoff, good=0)
        if self.good + 1 < self.interval:
            return replace(self, good=self.good + 1)
        return replace(self, value=self.value * self.growth, good=0)


@dataclass(frozen=True)
class Precision:
    """What a model computes in.

    Attributes:
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        scale: the loss scale at the start; None where the dtype has float32's range.
    """

    dtype: str = setting("float32", one_of("float32", "bfloat16", "float16"))
    scale: LossScale | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def cast(self, tree: Any) -> Any:
        """The tree with its floating arrays in the dtype; as they are for float32, which asks for nothing."""
        if self.dtype == "float32":
            return tree
        return trees.refill(tree, [_cast(leaf, self.dtype) for leaf in trees.leaves(tree)])

    def check(self, array: Array) -> None:
        """Refuse a dtype that the library of an array does not compute in.

        Raises:
            UnsupportedError: it does not.
        """
        xp = namespace(array)
        if not hasattr(xp, self.dtype):
            message = (
                f"precision is {self.dtype}, which {xp.__name__} does not compute in; choose another precision, or "
                "another array library"
            )
            raise UnsupportedError(message)


def precision_of(name: str | Precision) -> Precision:
    """The precision of a name: `"fp32"`, `"bf16"` or `"fp16"`, or the dtype's full name.

    Raises:
        ConfigError: the name is none of them.
    """
    if isinstance(name, Precision):
        return name
    if not isinstance(name, str) or name not in _NAMES:
        message = f"precision is {name!r}; it must be one of {', '.join(map(repr, _NAMES))}, or a Precision"
        raise ConfigError(message)
    dtype = _NAMES[name]
    return Precision(dtype, LossScale() if dtype == "float16" else None)


def _cast(leaf: Any, dtype: str) -> Any:
    if leaf is None or not hasattr(leaf, "dtype"):
        return leaf
    xp = namespace(leaf)
    wanted = getattr(xp, dtype)
    if leaf.dtype == wanted or not xp.isdtype(leaf.dtype, "real floating"):
        return leaf
    return xp.astype(leaf, wanted)
