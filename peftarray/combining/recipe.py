"""The ways to combine adapters: for each, what it works on, what it leaves out first, and whether signs are elected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from peftarray.errors import ConfigError
from peftarray.settings import check_settings, number, one_of, optional, setting, whole

__all__ = ["COMBINATIONS", "Combination", "Recipe", "checked_weights", "scaled_weights"]

_TINY = 1e-6
"""How far the weights of a SLERP may sum from 1, so that 0.1 and 0.9 do."""


@dataclass(frozen=True)
class Combination:
    """One way to combine.

    Attributes:
        space: what is combined: the updates by a weighted `"sum"`, or along the `"arc"` between two; the two
            `"factors"` of low-rank updates, each by itself; the `"matrix"` of each update; their `"directions"` in a
            basis that all share.
        drop: which entries are left out before: `""` none, `"magnitude"` the smallest, `"random"` (DARE), `"della"`,
            `"breadcrumbs"`.
        elects: whether entries that disagree with the sign of most are left out, and the others averaged (TIES).
        shortens: whether the result is cut to a rank when none is given: to the largest of the sources'.
    """

    space: Literal["sum", "arc", "factors", "matrix", "directions"]
    drop: Literal["", "magnitude", "random", "della", "breadcrumbs"] = ""
    elects: bool = False
    shortens: bool = False


COMBINATIONS: Mapping[str, Combination] = MappingProxyType(
    {
        "cat": Combination("sum"),
        "task_arithmetic": Combination("sum"),
        "svd": Combination("sum", shortens=True),
        "slerp": Combination("arc"),
        "linear": Combination("factors"),
        "ties": Combination("factors", "magnitude", elects=True),
        "dare_linear": Combination("factors", "random"),
        "dare_ties": Combination("factors", "random", elects=True),
        "magnitude_prune": Combination("factors", "magnitude"),
        "ties_svd": Combination("matrix", "magnitude", elects=True, shortens=True),
        "dare_linear_svd": Combination("matrix", "random", shortens=True),
        "dare_ties_svd": Combination("matrix", "random", elects=True, shortens=True),
        "magnitude_prune_svd": Combination("matrix", "magnitude", shortens=True),
        "della_svd": Combination("matrix", "della", elects=True, shortens=True),
        "della_linear_svd": Combination("matrix", "della", shortens=True),
        "breadcrumbs_svd": Combination("matrix", "breadcrumbs", shortens=True),
        "knots_ties": Combination("directions", "magnitude", elects=True),
        "knots_dare_ties": Combination("directions", "random", elects=True),
    }
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How adapters are combined, on every layer.

    Attributes:
        combination: a name in `COMBINATIONS`.
        rank: cut the result to this rank; None leaves it as the combination makes it.
        energy: cut the result to the smallest rank that keeps this share of its squared norm; `rank` bounds it.
        density: share of the entries that are not left out, by the combinations that leave some out.
        epsilon: of DELLA: by how much the drop rates of a row's smallest and largest entry differ.
        gamma: of Breadcrumbs: the share of the largest entries that is left out.
        majority_sign: which sign wins an election: that of the sum (`"total"`), or of most (`"frequency"`).
        seed: of what is left out at random.

    Example:
        >>> Recipe(combination="ties", density=0.5).way.elects
        True
    """

    combination: str = setting("cat", one_of(*COMBINATIONS))
    rank: int | None = setting(None, optional(whole(1)))
    energy: float | None = setting(None, optional(number(0.0, 1.0)))
    density: float | None = setting(None, optional(number(0.0, 1.0)))
    epsilon: float = setting(0.1, number(0.0, 1.0))
    gamma: float = setting(0.01, number(0.0, 1.0))
    majority_sign: str = setting("total", one_of("total", "frequency"))
    seed: int = setting(0, whole(0))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.energy == 0:
            message = "energy is 0, which keeps nothing; give a share above 0, at most 1"
            raise ConfigError(message)
        drop, density = self.way.drop, self.density
        if not drop:
            if density is not None:
                message = (
                    f"density is {density}, and {self.combination} leaves no entries out; leave it away, or choose "
                    f"one of {', '.join(name for name, way in COMBINATIONS.items() if way.drop)}"
                )
                raise ConfigError(message)
            return
        if density is None or density == 0:
            message = (
                f"{self.combination} needs density, the share of the entries that stay: above 0, at most 1; it is "
                f"{density}"
            )
            raise ConfigError(message)
        if drop == "della" and self.epsilon > 2 * min(density, 1 - density) + _TINY:
            message = (
                f"epsilon is {self.epsilon}; with density {density}, drop rates of {1 - density:g} +- epsilon / 2 must "
                f"lie in 0 to 1: give at most {2 * min(density, 1 - density):g}"
            )
            raise ConfigError(message)
        if drop == "breadcrumbs" and density + self.gamma > 1 + _TINY:
            message = (
                f"density is {density} and gamma {self.gamma}; what stays and the largest entries that do not are more "
                f"than all: give density at most {1 - self.gamma:g}"
            )
            raise ConfigError(message)

    @property
    def way(self) -> Combination:
        """What `combination` names."""
        return COMBINATIONS[self.combination]


def checked_weights(weights: Sequence[float] | None, count: int, recipe: Recipe) -> list[float]:
    """The weight of each of `count` adapters, 1 where none are given.

    Raises:
        ConfigError: there are not as many, one is no finite number, all are 0, or a SLERP has none between 0 and 1.
    """
    if count == 0:
        message = "there are no adapters to combine; give at least one"
        raise ConfigError(message)
    if weights is None:
        found = [0.5, 0.5] if recipe.way.space == "arc" and count == 2 else [1.0] * count
    else:
        found = [float(weight) for weight in weights]
    _check_count(found, count)
    for weight in found:
        if not math.isfinite(weight):
            message = f"a weight is {weight}; weights must be finite numbers"
            raise ConfigError(message)
    if not any(found):
        message = "all weights are 0, so nothing would be left; give at least one that is not"
        raise ConfigError(message)
    if recipe.way.space == "arc" and not (count == 2 and min(found) >= 0 and abs(sum(found) - 1) <= _TINY):
        message = (
            f"slerp goes from one adapter to another, and the weights of {count} adapters are {found}; give two "
            "adapters, with weights 1 - t and t for a t from 0 to 1"
        )
        raise ConfigError(message)
    return found


def scaled_weights(weights: Sequence[float], scales: Sequence[float]) -> list[float]:
    """Weights of adapters that act at these scales, each times its scale.

    Raises:
        ConfigError: there are not as many.

    Example:
        >>> scaled_weights([0.5, 1.0], [2.0, 1.0])
        [1.0, 1.0]
    """
    _check_count(weights, len(scales))
    return [weight * scale for weight, scale in zip(weights, scales, strict=True)]


def _check_count(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        message = f"{len(weights)} weights are given for {count} adapters; give one for each"
        raise ConfigError(message)
