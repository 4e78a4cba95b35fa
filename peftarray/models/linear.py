"""The layers that adapters adapt, as functions of named weights: one place where activations meet a matrix.

Activations are rows, `(batch * length, width)`, sample after sample: one product for a whole batch, and no reshape
between layers. A weight may be any array, or what stands for one: it sees `x @ w.mT`, `x @ w` and `take` alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftarray.arrays import Array, namespace, weight_product
from peftarray.errors import MatchError, nearest

__all__ = ["Weights", "embedding", "find", "linear", "linear_transposed"]

Weights = Mapping[str, Array]
"""Arrays by name."""


def find(weights: Weights, name: str) -> Array:
    """The weight of this name.

    Raises:
        MatchError: there is none.
    """
    try:
        return weights[name]
    except KeyError:
        message = f"the weights have no {name}{nearest(name, weights)}; give all that model.weights names"
        raise MatchError(message) from None


def linear(weights: Weights, name: str, x: Array) -> Array:
    """Rows `(n, in)` through a weight `(out, in)`, with its bias where it has one: `x W^T + b`, `(n, out)`."""
    return _plus_bias(weight_product(x, find(weights, f"{name}.weight")), weights, name)


def linear_transposed(weights: Weights, name: str, x: Array) -> Array:
    """Rows `(n, in)` through a weight stored `(in, out)`, as transformers' Conv1D: `x W + b`, `(n, out)`."""
    return _plus_bias(x @ find(weights, f"{name}.weight"), weights, name)


def embedding(weights: Weights, name: str, rows: Array) -> Array:
    """The rows of a table `(vocabulary, width)` with these numbers `(n,)`: `(n, width)`."""
    table = find(weights, f"{name}.weight")
    return namespace(table).take(table, rows, axis=0)


def _plus_bias(y: Array, weights: Weights, name: str) -> Array:
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias
