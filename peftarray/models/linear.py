"""The layers that adapters adapt, as functions of named weights: one place where activations meet a matrix.

Activations are rows, `(batch * length, width)`, sample after sample: one product for a whole batch, and no reshape
between layers. A weight may be any array, or what stands for one: it sees `x @ w.mT`, `x @ w` and `take` alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftarray.arrays import Array, namespace, weight_product
from peftarray.autodiff.fused.bias import add_bias
from peftarray.errors import MatchError, nearest
from peftarray.routes import Weight

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
    weight = find(weights, f"{name}.weight")
    return _plus_bias(weight_product(x, weight), weight, weights.get(f"{name}.bias"))


def linear_transposed(weights: Weights, name: str, x: Array) -> Array:
    """Rows `(n, in)` through a weight stored `(in, out)`, as transformers' Conv1D: `x W + b`, `(n, out)`."""
    weight = find(weights, f"{name}.weight")
    return _plus_bias(x @ weight, weight, weights.get(f"{name}.bias"))


def embedding(weights: Weights, name: str, rows: Array) -> Array:
    """The rows of a table `(vocabulary, width)` with these numbers `(n,)`: `(n, width)`."""
    table = find(weights, f"{name}.weight")
    return namespace(table).take(table, rows, axis=0)


def _plus_bias(y: Array, weight: Array, bias: Array | None) -> Array:
    if bias is None:
        return y
    # Nobody else holds the product with an array; what an adapter made its output of, it may still need.
    return y + bias if isinstance(weight, Weight) else add_bias(y, bias)
