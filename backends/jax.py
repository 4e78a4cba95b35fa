"""JAX: its grad and jit. Without `jax_enable_x64`, 64-bit values become 32-bit ones, as JAX has it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, Literal

import jax
import numpy as np
from jax.extend import core

from peftarray import arrays, trees
from peftarray.gradients import Chosen, check_loss, refuse_unused

__all__ = [
    "COMPILES",
    "SIDE_BY_SIDE",
    "checkpoint",
    "from_host",
    "jit",
    "linear_map",
    "random_state",
    "set_random_state",
    "to_host",
    "value_and_grad",
]

COMPILES = True
"""JAX is made for it."""
SIDE_BY_SIDE = False


def from_host(array: np.ndarray, *, device: Any = None) -> jax.Array:
    """An array with the values of `array` on a device of JAX (`"cpu"`, `"cuda:1"`), the default one if None."""
    if isinstance(device, str):
        platform, _, number = device.partition(":")
        device = jax.devices(platform)[int(number or 0)]
    return jax.device_put(array, device)


def to_host(array: Any) -> np.ndarray:
    """A NumPy array with the values of a JAX array."""
    return arrays.to_host(array)


def value_and_grad(
    loss: Callable[..., Any],
    *,
    frozen: Collection[str] = (),
    has_aux: bool = False,
    unused: Literal["refuse", "zero"] = "refuse",
    compiled: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """As in `peftarray.backend.Backend`. What a compiled loss takes beside `params` must be arrays and numbers."""

    def run(params: Any, others: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        chosen = Chosen(params, frozen)

        def of_chosen(leaves: list[Any]) -> Any:
            result = loss(chosen.filled(leaves), *others, **options)
            check_loss(result[0] if has_aux else result)
            return result

        if unused == "refuse":
            used = _used(jax.make_jaxpr(of_chosen)(chosen.arrays))
            refuse_unused(
                [chosen.names[place] for place, is_used in zip(chosen.places, used, strict=True) if not is_used]
            )
        value, gradients = jax.value_and_grad(of_chosen, has_aux=has_aux)(chosen.arrays)
        return value, chosen.gradients(gradients)

    function = jit(run) if compiled else run

    def in_order(params: Any, *others: Any, **options: Any) -> tuple[Any, Any]:
        tree = trees.refill(params, trees.leaves(params))  # of plain dicts, whatever mappings it came in
        value, gradients = function(tree, others, options)
        found = dict(trees.named(gradients))  # a compiled function sorts the keys of dicts
        return value, trees.refill(tree, [found[name] for name, _ in trees.named(tree)])

    return in_order


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, keeping nothing for its gradient but its arguments: it is run again on the way back."""
    return jax.checkpoint(function)


def linear_map(product: Callable[[Any], Any], transpose: Callable[[Any], Any], x: Any) -> jax.Array:
    """As in `peftarray.backend.Backend`: JAX transposes by itself what it is told to make again."""
    return jax.checkpoint(product)(x)


def random_state() -> dict[str, Any]:
    """Nothing: JAX has no generator of its own."""
    return {}


def set_random_state(state: dict[str, Any]) -> None:
    """Nothing."""


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled; what it takes must be arrays and numbers.

    Arrays that it reads from around it are handed to the program as well. JAX would write them into it: a model's
    weights, several times over.
    """
    programs: dict[Any, Callable[..., Any]] = {}

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        given, form = jax.tree.flatten((arguments, options))
        if any(isinstance(array, jax.core.Tracer) for array in given):  # it is part of another program
            return function(*arguments, **options)
        kind = form, tuple(map(jax.typeof, given))
        if kind not in programs:
            programs[kind] = _program(function, given, form)
        return programs[kind](given)

    return run


def _program(function: Callable[..., Any], given: list[Any], form: Any) -> Callable[[list[Any]], Any]:
    def flat(*leaves: Any) -> Any:
        arguments, options = jax.tree.unflatten(form, leaves)
        return function(*arguments, **options)

    traced, shapes = jax.make_jaxpr(flat, return_shape=True)(*given)
    program = jax.jit(lambda around, leaves: core.jaxpr_as_fun(core.ClosedJaxpr(traced.jaxpr, around))(*leaves))
    result = jax.tree.structure(shapes)
    return lambda leaves: jax.tree.unflatten(result, program(traced.consts, leaves))


def _used(traced: core.ClosedJaxpr) -> list[bool]:
    """Whether the first result depends on each argument, but for what `stop_gradient` cuts off."""
    found = set(traced.jaxpr.outvars[:1])
    for equation in reversed(traced.jaxpr.eqns):
        if equation.primitive.name != "stop_gradient" and not found.isdisjoint(equation.outvars):
            found.update(x for x in equation.invars if not isinstance(x, core.Literal))
    return [x in found for x in traced.jaxpr.invars]
