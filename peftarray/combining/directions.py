"""Updates in a basis that all of them share, so that merging entry by entry compares like with like (KnOTS).

Source: Stoica et al., Model merging with SVD to tie the Knots, 2024, section 4, arXiv:2410.19735.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftarray.arrays import Array, namespace
from peftarray.combining.spectrum import matrix_spectrum, numerical_rank
from peftarray.combining.updates import Update

__all__ = ["shared_directions"]


def shared_directions(updates: Sequence[Update]) -> tuple[Array, list[Array]]:
    """`U diag(s)`, and each update's own `V_k`: `update_k = U diag(s) V_k`, of the updates side by side.

    `[update_1 ... update_n] = U diag(s) [V_1 ... V_n]` is a singular value decomposition; of low-rank updates it is
    made from their factors. Directions whose singular values are rounding are left out.

    Returns:
        `(out, k)`, and one `(k, fan_in)` for each update.
    """
    products = [update.factors for update in updates if update.factors is not None]
    if len(products) == len(updates) and sum(up.shape[1] for up, _ in products) < updates[0].layer.out:
        return _of_products(products)
    matrices = [update.dense() for update in updates]
    found = matrix_spectrum(namespace(*matrices).concat(matrices, axis=1))
    rank = max(1, numerical_rank(found))
    return found.left[:, :rank] * found.values[:rank], _split(found.right[:rank, :], matrices)


def _of_products(products: Sequence[tuple[Array, Array]]) -> tuple[Array, list[Array]]:
    """The same from `up (out, r)` and `down (r, fan_in)` of each, without forming the updates."""
    xp = namespace(*(array for product in products for array in product))
    left, upper = xp.linalg.qr(xp.concat([up for up, _ in products], axis=1))
    columns, bases, start = [], [], 0
    for up, down in products:
        basis, lower = xp.linalg.qr(down.mT)
        columns.append(upper[:, start : start + up.shape[1]] @ lower.mT)
        bases.append(basis)
        start += up.shape[1]
    core = matrix_spectrum(xp.concat(columns, axis=1))
    rank = max(1, numerical_rank(core))
    rights = _split(core.right[:rank, :], columns)
    scaled = left @ (core.left[:, :rank] * core.values[:rank])
    return scaled, [right @ basis.mT for right, basis in zip(rights, bases, strict=True)]


def _split(whole: Array, parts: Sequence[Array]) -> list[Array]:
    """Columns of `whole`, as many as each part has."""
    found, start = [], 0
    for part in parts:
        found.append(whole[:, start : start + part.shape[1]])
        start += part.shape[1]
    return found
