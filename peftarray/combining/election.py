"""The election of signs: entries that disagree with most are left out, and the others averaged.

Source: Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023, section 4, arXiv:2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftarray.arrays import Array, namespace

__all__ = ["elect", "weighted_mean", "weighted_sum"]


def elect(tensors: Sequence[Array], majority_sign: str = "total") -> Array:
    """The sign, 1 or -1, that wins at each entry; 1 where it is undecided.

    Args:
        tensors: of one shape.
        majority_sign: `"total"`, that of the sum; `"frequency"`, that of most.

    Example:
        >>> import numpy as np
        >>> votes = [np.array([3.0, 3.0]), np.array([-1.0, 1.0]), np.array([-1.0, 0.0])]
        >>> elect(votes).tolist(), elect(votes, "frequency").tolist()
        ([1.0, 1.0], [-1.0, 1.0])
    """
    xp = namespace(*tensors)
    votes = tensors if majority_sign == "total" else [xp.sign(tensor) for tensor in tensors]
    total = weighted_sum(votes, [1.0] * len(votes))
    one = xp.ones_like(total)
    return xp.where(total >= 0, one, -one)


def weighted_mean(tensors: Sequence[Array], weights: Sequence[float], majority_sign: str = "total") -> Array:
    """At each entry the weighted sum of the tensors that have the elected sign there, divided by their number.

    A negative weight stands for the negated tensor, in the election as in the sum: it votes against its own sign.
    """
    xp = namespace(*tensors)
    signed = [tensor if weight >= 0 else -tensor for tensor, weight in zip(tensors, weights, strict=True)]
    winner = elect(signed, majority_sign)
    agree = [xp.astype(xp.sign(tensor) == winner, tensor.dtype) for tensor in signed]
    total = weighted_sum([tensor * mask for tensor, mask in zip(signed, agree, strict=True)], list(map(abs, weights)))
    count = weighted_sum(agree, [1.0] * len(agree))
    return total / xp.where(count > 0, count, xp.ones_like(count))


def weighted_sum(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    """The sum of the tensors times their weights."""
    first, *rest = (tensor * weight for tensor, weight in zip(tensors, weights, strict=True))
    for term in rest:
        first = first + term
    return first
