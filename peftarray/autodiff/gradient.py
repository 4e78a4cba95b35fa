"""Values and gradients of a function of a tree of arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import numpy as np

from peftarray.arrays import namespace
from peftarray.autodiff import trees
from peftarray.autodiff.space import new_tape
from peftarray.autodiff.tape import backward
from peftarray.autodiff.traced import Traced, is_traced, plain
from peftarray.errors import PeftError, nearest

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
        names = [name for name, _ in trees.named(params)]
        # NumPy's arithmetic makes scalars of arrays without axes.
        values = [np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for leaf in trees.leaves(params)]
        trained = _trained(names, values, frozen)
        tape = new_tape(namespace(*(values[place] for place in trained)))
        leaves = {place: tape.leaf(values[place]) for place in trained}
        given = trees.refill(params, [leaves.get(place, value) for place, value in enumerate(values)])
        result = loss(given, *others, **options)
        result, aux = result if has_aux else (result, None)
        _check_loss(result)
        nodes = [leaf.node for leaf in leaves.values()]
        del given, leaves
        value, node = result.value, result.node
        del result
        found = dict(zip(trained, backward(tape.xp, [(node, tape.xp.ones_like(value))], nodes), strict=True))
        without = [place for place in trained if found[place] is None]
        if without and unused == "refuse":
            message = (
                f"the loss does not depend on {', '.join(names[place] for place in without)}; use them, name them in "
                "frozen, or pass unused='zero'"
            )
            raise PeftError(message)
        for place in without:
            found[place] = tape.xp.zeros_like(values[place])
        gradients = trees.refill(params, [found.get(place) for place in range(len(values))])
        value = tape.xp.asarray(value)  # NumPy's sums are scalars
        return ((value, _plain_tree(aux)) if has_aux else value), gradients

    return run(*arguments) if arguments else run


def _trained(names: Sequence[str], values: Sequence[Any], frozen: Collection[str]) -> list[int]:
    """The places of the arrays that gradients are asked for."""
    branches = [name + "." for name in frozen]
    for name, branch in zip(frozen, branches, strict=True):
        if not any(other == name or other.startswith(branch) for other in names):
            message = f"frozen names {name}, which params does not have{nearest(name, names)}"
            raise PeftError(message)
    places = [
        place
        for place, name in enumerate(names)
        if values[place] is not None and name not in frozen and not name.startswith(tuple(branches))
    ]
    if not places:
        message = "params holds no array that gets a gradient; give at least one that is not frozen"
        raise PeftError(message)
    for place in places:
        _check_array(names[place], values[place])
    return places


def _check_array(name: str, value: Any) -> None:
    if is_traced(value):
        message = f"{name} is traced already, and gradients of gradients are not offered; differentiate once"
        raise PeftError(message)
    if not hasattr(value, "dtype"):
        message = f"{name} is a {type(value).__name__}; params holds arrays, so make it one or pass it beside params"
        raise PeftError(message)
    if not namespace(value).isdtype(value.dtype, ("real floating", "complex floating")):
        message = f"{name} is {value.dtype}, which has no gradient; name it in frozen or pass it beside params"
        raise PeftError(message)


def _check_loss(result: Any) -> None:
    if not isinstance(result, Traced):
        message = f"the loss is a {type(result).__name__} that does not depend on params; compute it from them"
        raise PeftError(message)
    if result.shape != ():
        message = f"the loss has shape {result.shape}; it must be one number, so take its sum or mean"
        raise PeftError(message)
    if not result.node.tape.xp.isdtype(result.dtype, "real floating"):
        message = f"the loss is {result.dtype}; it must be a real number, so take its absolute value or real part"
        raise PeftError(message)


def _plain_tree(tree: Any) -> Any:
    return trees.refill(tree, [plain(leaf) for leaf in trees.leaves(tree)])
