"""Adapters of one layer combined into one LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peftarray.adapter import Adapter
from peftarray.arrays import Array, namespace, stop_gradient
from peftarray.combining.directions import shared_directions
from peftarray.combining.drops import dare, della, streams
from peftarray.combining.election import weighted_mean, weighted_sum
from peftarray.combining.pruning import prune, without_outliers
from peftarray.combining.recipe import Recipe, checked_weights
from peftarray.combining.slerp import arc_weights
from peftarray.combining.spectrum import Spectrum, cut, inner, matrix_spectrum, product_spectrum
from peftarray.combining.updates import Update, as_lora, check_same_layer, padded, update_of
from peftarray.errors import ConfigError, UnsupportedError

__all__ = ["LoraFit", "combine", "combine_by", "to_lora"]


@dataclass(frozen=True, eq=False)
class LoraFit:
    """A LoRA adapter, and how much it holds of the update that it stands for.

    Attributes:
        adapter: with scale 1.
        norm: the Frobenius norm of the update.
        error: the norm of what is missing, as a share of `norm`.
    """

    adapter: Adapter
    norm: float
    error: float = 0.0

    @property
    def energy(self) -> float:
        """The share of the update's squared norm that the adapter holds."""
        return 1.0 - self.error**2

    @property
    def rank(self) -> int:
        """The adapter's."""
        return int(self.adapter.params["lora_B"].shape[1])


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    combination: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    epsilon: float = 0.1,
    gamma: float = 0.01,
    majority_sign: str = "total",
    seed: int = 0,
    base: Array | None = None,
) -> LoraFit:
    """One LoRA adapter in place of several of one layer.

    Args:
        adapters: of any methods, with arrays of one library.
        weights: one for each, 1 by default; a negative one stands for the negated adapter, 0 leaves it out.
        combination, rank, energy, density, epsilon, gamma, majority_sign, seed: see `Recipe`.
        base: the layer's weight as the model stores it, where a method needs it: what DoRA adds depends on it.

    Raises:
        ConfigError: a setting is not allowed, or contradicts another.
        ShapeError: the adapters are for layers of several shapes.
        UnsupportedError: an adapter needs the base, or has no factors where the combination works on them.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoraConfig
        >>> weight = np.zeros((6, 5), np.float32)
        >>> one, two = (LoraConfig(r=2, init_lora_weights=False).init(weight, seed=seed) for seed in (1, 2))
        >>> both = combine([one, two], [0.5, -1.0])
        >>> bool(np.allclose(both.adapter.merge(weight), 0.5 * one.merge(weight) - two.merge(weight), atol=1e-6))
        True
        >>> fit = combine([one, two], combination="svd", rank=2)
        >>> fit.rank, 0.5 < fit.energy < 1
        (2, True)
    """
    recipe = Recipe(
        combination=combination,
        rank=rank,
        energy=energy,
        density=density,
        epsilon=epsilon,
        gamma=gamma,
        majority_sign=majority_sign,
        seed=seed,
    )
    return combine_by(recipe, adapters, checked_weights(weights, len(adapters), recipe), base=base)


def to_lora(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None, base: Array | None = None
) -> LoraFit:
    """An adapter of any method as a LoRA adapter: exact where the method has factors, or by singular values.

    Args:
        adapter: the adapter.
        rank: the largest rank allowed.
        energy: the share of the update's squared norm to keep, by the smallest rank that does.
        base: the layer's weight as the model stores it, where the method needs it.

    Raises:
        PeftError: as for `combine`.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoHaConfig
        >>> adapter = LoHaConfig(r=2, init_weights=False).init(np.zeros((8, 6), np.float32), seed=0)
        >>> to_lora(adapter, energy=0.999).rank
        4
    """
    recipe = Recipe(rank=rank, energy=energy)
    return combine_by(recipe, [adapter], [1.0], base=base)


def combine_by(
    recipe: Recipe, adapters: Sequence[Adapter], weights: Sequence[float], *, base: Array | None = None
) -> LoraFit:
    """`combine` by a recipe, with weights that are checked.

    Adapters of weight 0 take no part. Biases are summed with the weights, whatever the combination.
    """
    used = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if weight]
    if not used:
        message = "no adapter of this layer has a weight that is not 0; leave the layer out"
        raise ConfigError(message)
    adapters, weights = [_constant(adapter) for adapter, _ in used], [weight for _, weight in used]
    updates = [update_of(adapter, base) for adapter in adapters]
    layer = check_same_layer(updates)
    way = recipe.way
    names = streams(adapters, weights) if way.drop in ("random", "della") else [layer.name] * len(updates)
    made: tuple[Array, Array] | Array
    if way.space == "factors":
        made = _of_factors(recipe, updates, weights, names)
    elif way.space == "matrix":
        made = _merged(recipe, [update.dense() for update in updates], weights, names)
    elif way.space == "directions":
        left, rights = shared_directions(updates)
        made = left, _merged(recipe, rights, weights, names)
    else:
        made = _sum(updates, _on_arc(updates, weights) if way.space == "arc" else weights)
    up, down, norm, error = _shortened(made, recipe, updates)
    moved = [(update.bias, weight) for update, weight in zip(updates, weights, strict=True) if update.bias is not None]
    bias = weighted_sum(*zip(*moved, strict=True)) if moved else None
    return LoraFit(as_lora(up, down, layer, bias=bias), norm, error)


def _constant(adapter: Adapter) -> Adapter:
    """The same numbers, apart from what trains them."""
    return replace(adapter, params={name: stop_gradient(array) for name, array in adapter.params.items()})


def _of_factors(
    recipe: Recipe, updates: Sequence[Update], weights: Sequence[float], names: Sequence[str]
) -> tuple[Array, Array]:
    """Each factor merged by itself, with the root of weight and scale; the sign goes to `down`, so that it counts once.

    The product has terms of one adapter's `up` and another's `down`, which is in the definition of these combinations.
    """
    products = [update.factors for update in updates if update.factors is not None]
    if len(products) < len(updates):
        message = (
            f"{updates[0].layer.name}: {recipe.combination} works on the factors of low-rank adapters, and one of "
            "these has none; choose cat or svd, or one whose name ends in _svd"
        )
        raise UnsupportedError(message)
    factors = [weight * update.scale for update, weight in zip(updates, weights, strict=True)]
    known = [place for place, factor in enumerate(factors) if factor]
    if not known:  # all are zero, as products of their scales
        return products[0]
    rank = max(up.shape[1] for up, _ in products)
    ups, downs = [], []
    for place in known:
        (up, down), name = products[place], names[place]
        ups.append(padded(_dropped(recipe, up / updates[place].scale, f"{name}/up"), rank, 1))
        downs.append(padded(_dropped(recipe, down, f"{name}/down"), rank, 0))
    factors = [factors[place] for place in known]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    return _voted(recipe, ups, roots), _voted(recipe, downs, signed)


def _merged(recipe: Recipe, matrices: Sequence[Array], weights: Sequence[float], names: Sequence[str]) -> Array:
    dropped = [_dropped(recipe, matrix, name) for matrix, name in zip(matrices, names, strict=True)]
    return _voted(recipe, dropped, weights)


def _dropped(recipe: Recipe, x: Array, stream: str) -> Array:
    """What a recipe leaves of a matrix."""
    density = recipe.density
    if density is None:
        return x
    if recipe.way.drop == "magnitude":
        return prune(x, density)
    if recipe.way.drop == "breadcrumbs":
        return without_outliers(x, density, recipe.gamma)
    if recipe.way.drop == "della":
        return della(x, density, recipe.epsilon, seed=recipe.seed, stream=stream)
    return dare(x, density, seed=recipe.seed, stream=stream)


def _voted(recipe: Recipe, tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    if recipe.way.elects:
        return weighted_mean(tensors, weights, recipe.majority_sign)
    return weighted_sum(tensors, weights)


def _on_arc(updates: Sequence[Update], weights: Sequence[float]) -> list[float]:
    """The factors of a SLERP; of a layer that one adapter has alone, its weight."""
    if len(updates) != 2:
        return list(weights)
    one, two = (update.factors for update in updates)
    if one is not None and two is not None:
        product, norms = inner(one, two), [math.sqrt(max(0.0, inner(factors, factors))) for factors in (one, two)]
    else:
        first, second = (update.dense() for update in updates)
        xp = namespace(first, second)
        product = float(xp.sum(first * second))
        norms = [float(xp.linalg.matrix_norm(matrix)) for matrix in (first, second)]
    return arc_weights(weights, product, norms)


def _sum(updates: Sequence[Update], weights: Sequence[float]) -> tuple[Array, Array] | Array:
    """The weighted sum of updates: by longer factors where all have factors, or else as a matrix."""
    products = [update.factors for update in updates if update.factors is not None]
    if len(products) < len(updates):
        return weighted_sum([update.dense() for update in updates], weights)
    xp = namespace(*products[0], *products[-1])
    # Columns of `up` as they are, so that the weights, where the sum is exact, are rounded once.
    up = xp.concat([up for up, _ in products], axis=1)
    down = xp.concat([down * weight for (_, down), weight in zip(products, weights, strict=True)], axis=0)
    return up, down


def _shortened(
    made: tuple[Array, Array] | Array, recipe: Recipe, updates: Sequence[Update]
) -> tuple[Array, Array, float, float]:
    """`up`, `down`, the norm of the whole and the share of it that is missing."""
    product = made if isinstance(made, tuple) else None
    rank, energy = recipe.rank, recipe.energy
    if rank is None and energy is None and recipe.way.shortens:
        rank = max((update.rank or 0 for update in updates), default=0) or None
    if rank is None and energy is None:
        if product is None:
            message = (
                f"{updates[0].layer.name}: an update without factors has no rank of its own; give the rank, or the "
                "energy to keep (rank=, energy=; --rank, --energy)"
            )
            raise ConfigError(message)
        return *product, math.sqrt(max(0.0, inner(product, product))), 0.0
    if (
        product is not None
        and energy is None
        and rank is not None
        and product[0].shape[1] <= rank
        and not (recipe.way.shortens)
    ):
        return *product, math.sqrt(max(0.0, inner(product, product))), 0.0
    spectrum = matrix_spectrum(made) if product is None else product_spectrum(*product)
    return _cut(spectrum, cut(spectrum, rank, energy))


def _cut(spectrum: Spectrum, rank: int) -> tuple[Array, Array, float, float]:
    squares = spectrum.on_host**2
    total = float(squares.sum())
    up = spectrum.left[:, :rank] * spectrum.values[:rank]
    error = math.sqrt(float(squares[rank:].sum()) / total) if total else 0.0
    return up, spectrum.right[:rank, :], math.sqrt(total), error
