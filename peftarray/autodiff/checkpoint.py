"""Trading time for memory: a part of the computation that keeps its inputs alone and is run again on the way back.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016, section 3, arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from peftarray import trees
from peftarray.arrays import Array
from peftarray.autodiff.rules import Needs, Result, Rule, Wanted
from peftarray.autodiff.space import new_tape
from peftarray.autodiff.tape import backward
from peftarray.autodiff.traced import is_traced, plain, record
from peftarray.errors import PeftError

__all__ = ["checkpoint"]


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, keeping nothing for its gradient but its arguments.

    It runs without tracing, and once more, traced, when its gradient is wanted. It must give the same result both
    times, and must get every traced array as an argument (in trees of dicts, lists and tuples), none from around it.

    Args:
        function: takes and gives trees that hold arrays.

    Raises:
        PeftError: `function` reads a traced array that is not among its arguments.

    Example:
        >>> import numpy as np
        >>> from peftarray.autodiff import value_and_grad
        >>> layer = checkpoint(lambda p, x: np.tanh(x @ p["w"]))
        >>> def loss(params):
        ...     x = np.ones((1, 2))
        ...     for p in params:
        ...         x = layer(p, x)
        ...     return np.sum(x)
        >>> value, gradients = value_and_grad(loss)([{"w": np.eye(2)}, {"w": np.eye(2)}])
        >>> gradients[0]["w"].round(3).tolist()
        [[0.247, 0.247], [0.247, 0.247]]
    """

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        leaves = trees.leaves((arguments, options))
        places = [place for place, leaf in enumerate(leaves) if is_traced(leaf)]
        if not places:
            return function(*arguments, **options)
        form = trees.refill((arguments, options), [None if is_traced(leaf) else leaf for leaf in leaves])

        def call(values: Iterable[Array]) -> Any:
            filled = trees.leaves(form)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            inner_arguments, inner_options = trees.refill(form, filled)
            return function(*inner_arguments, **inner_options)

        result = call(plain(leaves[place]) for place in places)
        results = trees.leaves(result)
        xp = leaves[places[0]].node.tape.xp
        numbers = [place for place, value in enumerate(results) if _has_gradient(xp, value)]

        def rule(xp: Any, needs: Needs, *values: Array) -> Result:
            def pull(wanted: Wanted) -> Wanted:
                tape = new_tape(xp)
                fresh = [tape.leaf(value) for value in values]
                nodes = [leaf.node for leaf in fresh]
                again = trees.leaves(call(fresh))
                del fresh
                seeds = [
                    (again[place].node, g)
                    for place, g in zip(numbers, wanted, strict=True)
                    if g is not None and is_traced(again[place])
                ]
                del again
                return backward(xp, seeds, nodes)

            return tuple(results[place] for place in numbers), pull

        recorded = record(Rule("checkpoint", rule), tuple(leaves[place] for place in places), {})
        for place, value in zip(numbers, recorded, strict=True):
            results[place] = value
        return trees.refill(result, results)

    return run


def _has_gradient(xp: Any, value: Any) -> bool:
    if is_traced(value):
        message = "a checkpointed function reads a traced array that is not among its arguments; pass it as one"
        raise PeftError(message)
    return hasattr(value, "dtype") and xp.isdtype(value.dtype, ("real floating", "complex floating"))
