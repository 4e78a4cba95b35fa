"""The layers that make prompts: linear ones and a bidirectional LSTM, as functions of arrays under torch's names."""

from __future__ import annotations

import math
from collections.abc import Callable

from peftarray.arrays import Array, Params, namespace
from peftarray.method import Param
from peftarray.random import Draw, kaiming_uniform, uniform_within

__all__ = ["linear", "linear_params", "lstm", "lstm_params", "relu"]


def linear_params(name: str, inputs: int, outputs: int) -> dict[str, Param]:
    """The table of a linear layer, which starts as `torch.nn.Linear` does."""
    return {
        f"{name}.weight": Param("out in", (outputs, inputs), init=kaiming_uniform),
        f"{name}.bias": Param("out", (outputs,), init=_spread(inputs)),
    }


def linear(p: Params, name: str, x: Array) -> Array:
    """`x W^T + b`."""
    return x @ p[f"{name}.weight"].mT + p[f"{name}.bias"]


def relu(x: Array) -> Array:
    """`max(x, 0)`."""
    return namespace(x).maximum(x, 0.0)


def lstm_params(name: str, inputs: int, hidden: int, layers: int) -> dict[str, Param]:
    """The table of a bidirectional LSTM, which starts as `torch.nn.LSTM` does."""
    table = {}
    for layer, end in _runs(layers):
        width = inputs if layer == 0 else 2 * hidden
        for kind, shape in (("ih", (4 * hidden, width)), ("hh", (4 * hidden, hidden))):
            table[f"{name}.weight_{kind}_{end}"] = Param("gates in", shape, init=_spread(hidden))
        for kind in ("ih", "hh"):
            table[f"{name}.bias_{kind}_{end}"] = Param("gates", (4 * hidden,), init=_spread(hidden))
    return table


def lstm(p: Params, name: str, x: Array, layers: int, between: Callable[[Array], Array] = lambda x: x) -> Array:
    """A bidirectional LSTM over rows `(steps, in)`: `(steps, 2 * hidden)`, forward half first.

        c = sigmoid(f) c + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c),  (i, f, g, o) = W_ih x + W_hh h + b_ih + b_hh

    Args:
        p: the arrays.
        name: what stands before their names.
        x: a row for each step.
        layers: how many, one after the other.
        between: what is done to rows between layers, such as dropout.

    Source: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; Gers et al., Learning to Forget, 2000, section 3.
    """
    for layer in range(layers):
        x = between(x) if layer else x
        halves = [_run(p, name, x, f"l{layer}{end}", backwards=bool(end)) for end in ("", "_reverse")]
        x = namespace(*halves).concat(halves, axis=1)
    return x


def _run(p: Params, name: str, x: Array, end: str, *, backwards: bool) -> Array:
    """One layer in one direction."""
    inputs = x @ p[f"{name}.weight_ih_{end}"].mT + p[f"{name}.bias_ih_{end}"] + p[f"{name}.bias_hh_{end}"]
    inner = p[f"{name}.weight_hh_{end}"].mT
    xp, width = namespace(inputs, inner), inner.shape[0]
    order = range(x.shape[0])
    hidden = cell = None
    found = []
    for step in reversed(order) if backwards else order:
        gates = inputs[step : step + 1, :] if hidden is None else inputs[step : step + 1, :] + hidden @ inner
        enter, keep, new, out = (gates[:, i * width : (i + 1) * width] for i in range(4))
        entered = _sigmoid(enter) * xp.tanh(new)
        cell = entered if cell is None else _sigmoid(keep) * cell + entered
        hidden = _sigmoid(out) * xp.tanh(cell)
        found.append(hidden)
    return xp.concat(found[::-1] if backwards else found, axis=0)


def _sigmoid(x: Array) -> Array:
    return 0.5 * namespace(x).tanh(0.5 * x) + 0.5  # by tanh, which does not overflow


def _runs(layers: int) -> list[tuple[int, str]]:
    """(layer, end of its arrays' names) for each layer and direction."""
    return [(layer, f"l{layer}{end}") for layer in range(layers) for end in ("", "_reverse")]


def _spread(count: int) -> Draw:
    """Uniform over +-1/sqrt(count)."""
    return uniform_within(1 / math.sqrt(count))
