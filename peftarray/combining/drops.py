"""What is left out at random: DARE's drops, which hit all entries alike, and DELLA's, which hit small ones more often.

The draws are made on the host from a seed and a name, so that the same entries fall out on every array library.

Sources: Yu et al., Language Models are Super Mario, 2023, section 3.2 (DARE), arXiv:2311.03099; Deep et al.,
DELLA-Merging, 2024, section 3.1 (MagPrune), arXiv:2406.11617.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from peftarray.adapter import Adapter
from peftarray.arrays import Array, constant, device, namespace, to_host
from peftarray.random import uniform

__all__ = ["dare", "della", "streams"]


def dare(x: Array, density: float, *, seed: int, stream: str) -> Array:
    """`x` with each entry at 0 with probability `1 - density`, and divided by `density` otherwise.

    Example:
        >>> dare(np.ones(6), 0.5, seed=0, stream="example").tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    """
    if density == 1:
        return x
    stays = uniform(seed, stream, tuple(x.shape)) < np.float32(density)
    return x * constant(stays.astype(np.float64) / density, x)


def della(x: Array, density: float, epsilon: float, *, seed: int, stream: str) -> Array:
    """`x` with entries at 0 by drop rates that grow as magnitudes fall within a row, the others divided by what stays.

    `p = 1 - density - epsilon / 2 + epsilon rank / n` for the entry of rank `0 .. n - 1` among the `n` of its row, the
    largest first.

    Args:
        x: a matrix `(rows, n)`.
        density: the share that stays, nearly.
        epsilon: by how much the rates within a row differ.
        seed, stream: of the draws.
    """
    xp = namespace(x)
    columns = x.shape[1]
    order = xp.argsort(-xp.abs(x), axis=1, stable=True)
    ranks = xp.reshape(xp.argsort(order, axis=1, stable=True), (-1,))
    rates = 1 - density - epsilon / 2 + epsilon * np.arange(columns) / columns
    stay = np.clip(1 - rates, 0, 1).astype(np.float32)
    chances = xp.reshape(xp.take(xp.asarray(stay, device=device(x)), ranks, axis=0), x.shape)
    drawn = xp.asarray(uniform(seed, stream, tuple(x.shape)), device=device(x))
    return x * xp.astype(drawn < chances, x.dtype) / xp.astype(xp.where(chances > 0, chances, 1.0), x.dtype)


def streams(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[str]:
    """A name for the draws of each adapter, from its layer's name and its own numbers.

    So their order does not matter, and neither do the names of files. Equal adapters are told apart by their weights'
    order.
    """
    names = [f"{adapter.layer.name}/{_digest(adapter)}" for adapter in adapters]
    found = list(names)
    for place in sorted(range(len(names)), key=lambda i: weights[i]):
        same = [i for i in range(len(names)) if names[i] == names[place]]
        found[place] = f"{names[place]}/{sorted(same, key=lambda i: weights[i]).index(place)}"
    return found


def _digest(adapter: Adapter) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(adapter.params):
        # As float64, which holds the values of every shorter dtype: the same numbers have the same digest.
        digest.update(name.encode() + np.ascontiguousarray(to_host(adapter.params[name]), np.float64).tobytes())
    return digest.hexdigest()
