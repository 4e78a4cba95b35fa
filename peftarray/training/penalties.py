"""Terms that are added to a loss to keep what training changes in a form."""

from __future__ import annotations

from typing import Any

from peftarray import trees
from peftarray.arrays import Array, device, namespace
from peftarray.errors import ConfigError, nearest
from peftarray.training.optimizer import Group

__all__ = ["orthogonality_penalty"]


def orthogonality_penalty(params: Any, pattern: str = r"(lora_A|lora_B)(\..*)?", *, weight: float = 0.5) -> Array:
    """`weight` times the mean over matrices M of `|M M^T - I|`, the Frobenius norm, with M's short side first.

    Args:
        params: a tree of arrays, such as `model.params` or, of a torch module, `dict(model.named_parameters())`.
        pattern: a regular expression for the end of a matrix's name, as in `Group`.
        weight: the factor.

    Returns:
        An array without axes.

    Raises:
        ConfigError: no matrix matches.

    Source: Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, equation 4,
    arXiv:2303.10512.

    Example:
        >>> import numpy as np
        >>> float(orthogonality_penalty({"lora_A": np.asarray([[1.0, 0.0]]), "lora_B": np.asarray([[2.0], [0.0]])}))
        0.75
    """
    chosen, named = Group(pattern), list(trees.named(params))
    matrices = [(name, array) for name, array in named if array is not None and array.ndim == 2]
    terms = [_from_identity(array) for name, array in matrices if chosen.has(name)]
    if not terms:
        message = f"no matrix of params matches the pattern {pattern!r}{nearest(pattern, [name for name, _ in named])}"
        raise ConfigError(message)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total * (weight / len(terms))


def _from_identity(matrix: Array) -> Array:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    eye = namespace(wide).eye(wide.shape[0], dtype=wide.dtype, device=device(wide))
    return namespace(wide).linalg.vector_norm(wide @ wide.mT - eye)
