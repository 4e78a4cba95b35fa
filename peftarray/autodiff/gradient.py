"""Values and gradients of a function of a tree of arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

from peftarray import trees
from peftarray.arrays import namespace
from peftarray.autodiff.space import new_tape
from peftarray.autodiff.tape import backward
from peftarray.autodiff.traced import Traced, is_traced, plain
from peftarray.errors import PeftError
from peftarray.gradients import Chosen, check_loss, refuse_independent, refuse_unused

__all__ = ["value_and_grad"]


def value_and_grad(
    loss: Callable[..., Any],
    *arguments: Any,
    frozen: Collection[str] = (),
    has_aux: bool = False,
    unused: Literal["refuse", "zero"] = "refuse",
) -> Any:
    """The value of `loss(params, ...)` and its gradient for every array in `params`.

    Called with the function alone it gives a function of the arguments; called with arguments as well, their result.

    Args:
        loss: takes `params` first and gives one real number, as an array without axes.
        *arguments: `params`, a tree of arrays in nested dicts, lists and tuples, and what else `loss` takes.
        frozen: names of arrays or branches of `params` that get no gradient (None stands in its place) and cost
            nothing. A name is the keys on the way, joined by dots: `layers.0.up`.
        has_aux: `loss` gives `(loss, aux)`, and the value is then `(loss, aux)` with plain arrays in `aux`.
        unused: whether an array that the loss does not depend on is an error, or has a gradient of zeros.

    Returns:
        `(value, gradients)`: gradients in the form of `params`, each with its array's shape and dtype, and its own
        memory, so that an optimiser may write into it.

    Raises:
        PeftError: the loss is not one real number; an array of `params` is not used, has no floating-point numbers or
            is traced by another call; a name in `frozen` is not there.

    Example:
        >>> import numpy as np
        >>> def loss(params, x, y):
        ...     return np.mean((x @ params["w"] + params["b"] - y) ** 2)
        >>> params = {"w": np.zeros(2), "b": np.zeros(())}
        >>> value, gradients = value_and_grad(loss)(params, np.eye(2), np.ones(2))
        >>> float(value), gradients["w"].tolist(), float(gradients["b"])
        (1.0, [-1.0, -1.0], -2.0)
    """

    def run(params: Any, *others: Any, **options: Any) -> tuple[Any, Any]:
        chosen = Chosen(params, frozen)
        _refuse_traced(chosen)
        tape = new_tape(namespace(*chosen.arrays))
        leaves = [tape.leaf(array) for array in chosen.arrays]
        result = loss(chosen.filled(leaves), *others, **options)
        result, aux = result if has_aux else (result, None)
        if not isinstance(result, Traced):
            refuse_independent(result)
        check_loss(result)
        nodes = [leaf.node for leaf in leaves]
        del leaves
        value, node = result.value, result.node
        del result
        gradients = backward(tape.xp, [(node, tape.xp.ones_like(value))], nodes)
        pairs = list(zip(chosen.places, gradients, strict=True))
        if unused == "refuse":
            refuse_unused([chosen.names[place] for place, gradient in pairs if gradient is None])
        filled = [tape.xp.zeros_like(chosen.values[place]) if g is None else g for place, g in pairs]
        value = tape.xp.asarray(value)  # NumPy's sums are scalars
        return ((value, _plain_tree(aux)) if has_aux else value), chosen.gradients(filled)

    return run(*arguments) if arguments else run


def _refuse_traced(chosen: Chosen) -> None:
    for place in chosen.places:
        if is_traced(chosen.values[place]):
            name = chosen.names[place]
            message = f"{name} is traced already, and gradients of gradients are not offered; differentiate once"
            raise PeftError(message)


def _plain_tree(tree: Any) -> Any:
    return trees.refill(tree, [plain(leaf) for leaf in trees.leaves(tree)])
